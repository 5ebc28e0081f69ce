"""Score a model on held-out records, with and without an adapter.

python -m keras_gemma_ft.evaluate --adapter=runs/default
python -m keras_gemma_ft.evaluate --preset=gemma2_2b_en --data.eval=test.jsonl
"""

from keras_gemma_ft import config, runtime


def evaluate(cfg):
    """Returns loss, perplexity and exact match of base and adapter."""
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft import workers
    from keras_gemma_ft.data import pipeline
    from keras_gemma_ft.inference import evaluation, taught
    from keras_gemma_ft.model import hosts, lora
    from keras_gemma_ft.tuning import fine_tuner

    workers.say_one(cfg, backend)
    hosts.start(cfg)
    with hosts.agreed():
        # The adapter is checked before the base is scored: a wrong path should
        # not cost minutes.
        cfg, loaded = taught.load(cfg, adapter=False, records=True)
        held_out = pipeline.prepare(
            cfg.data, loaded.tokenizer, "eval", cfg.seed
        )
    if held_out is None:
        raise config.UserError(
            "nothing to evaluate on: give --data.eval=FILE (or a share of "
            "--data.train, such as --data.eval=5%)."
        )

    def score(what):
        # LoRA changes which variables there are: a new tuner each time.
        tuner = fine_tuner.FineTuner(
            loaded.causal_lm, chunk=cfg.train.loss_chunk
        )
        tuner.compile()
        judge = evaluation.Judge(cfg, tuner, loaded.tokenizer, held_out)
        found = judge.judge(what)
        del found["answers"]
        return found

    result = {"preset": cfg.preset, "base": score("base")}
    if cfg.adapter:
        lora.load(loaded.causal_lm.backbone, cfg.adapter)
        result["adapter"] = score(cfg.adapter)
    return result


if __name__ == "__main__":
    runtime.main(evaluate, __doc__)
