"""Score a model on held-out records, with and without an adapter.

python -m keras_gemma_ft.evaluate --adapter=runs/default
python -m keras_gemma_ft.evaluate --adapter=runs/a,runs/b --data.eval=test.jsonl
python -m keras_gemma_ft.evaluate --preset=gemma2_2b_en --data.eval=test.jsonl
"""

from keras_gemma_ft import config, runtime


def evaluate(cfg):
    """Returns loss, perplexity and exact match of base and adapter.

    Of several adapters, which share the base in memory, {"base": {...},
    "adapters": {name: {...}}}, and the milliseconds of a switch.
    """
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft import workers
    from keras_gemma_ft.inference import evaluation, switching, taught
    from keras_gemma_ft.model import hosts
    from keras_gemma_ft.tuning import fine_tuner

    workers.say_one(cfg, backend)
    hosts.start(cfg)
    if switching.several(cfg.adapter):
        return _each(cfg)
    with hosts.agreed():
        # The adapter is checked before the base is scored: a wrong path should
        # not cost minutes.
        cfg, loaded = taught.load(cfg, adapter=False, records=True)
        held_out = _held_out(cfg, loaded.tokenizer)

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
        held, loaded = [loaded], None
        loaded = taught.adapted(cfg, held)
        result["adapter"] = score(cfg.adapter)
    return result


def _held_out(cfg, tokenizer):
    """The records to score on: `data.prepared.Prepared`."""
    from keras_gemma_ft.data import pipeline

    held_out = pipeline.prepare(cfg.data, tokenizer, "eval", cfg.seed)
    if held_out is None:
        raise config.UserError(
            "nothing to evaluate on: give --data.eval=FILE (or a share of "
            "--data.train, such as --data.eval=5%)."
        )
    return held_out


def _each(cfg):
    """The result of several adapters, which take turns on one base."""
    from keras_gemma_ft.inference import evaluation, switching
    from keras_gemma_ft.model import hosts
    from keras_gemma_ft.tuning import fine_tuner

    with hosts.agreed():
        ways, loaded, adapters = switching.load(cfg, records=True)
        prepared = {
            own.data: _held_out(own, loaded.tokenizer) for own in ways.values()
        }
    if len(prepared) > 1:
        runtime.say(
            f"data: each adapter is asked in its own way, {adapters.base} as "
            f"{adapters.names[0]}"
        )
    tuner = fine_tuner.FineTuner(loaded.causal_lm, chunk=cfg.train.loss_chunk)
    tuner.compile()
    found, generator = {}, None
    for name in [adapters.base, *adapters.names]:
        adapters.use(name, runtime.say)
        judge = evaluation.Judge(
            ways[name],
            tuner,
            loaded.tokenizer,
            prepared[ways[name].data],
            generator=generator,
        )
        generator = judge.generator
        found[name] = judge.judge(name)
        del found[name]["answers"]
    return {
        "preset": ways[adapters.base].preset,
        "base": found.pop(adapters.base),
        "adapters": found,
        "switch_ms": adapters.milliseconds(),
    }


if __name__ == "__main__":
    runtime.main(evaluate, __doc__)
