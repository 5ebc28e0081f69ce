"""Fine-tune Gemma 2 with LoRA.

python -m keras_gemma_ft.train
    tunes the embedded model on the embedded task, offline, on any machine.
python -m keras_gemma_ft.train --preset=gemma2_2b_en --data.train=mine.jsonl
    tunes the real one on your records.
python -m keras_gemma_ft.train --adapter=runs/default --run_dir=runs/next \\
    --data.train=more.jsonl
    goes on from an adapter with other records.
"""

from keras_gemma_ft import config, runtime


def train(cfg):
    """Runs `cfg`; returns what summary.json holds."""
    from keras_gemma_ft import family, workers
    from keras_gemma_ft.formats import usage

    family.watch()
    cfg = usage.settle(cfg, runtime.say)
    if (count := workers.wanted(cfg)) > 1:
        return workers.run(cfg, count)
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft.model import hosts
    from keras_gemma_ft.planning import settling, shapes
    from keras_gemma_ft.tuning import parent, trainer

    hosts.start(cfg)
    with hosts.agreed():
        parent.stay_apart(cfg)
        settings = shapes.of_preset(cfg.preset)
        cfg = parent.settle(cfg, settings)

    def settled():
        # On process 0 for all: another host's memory may differ.
        parts = hosts.count() if hosts.apart() else 1
        own = _share(cfg, parts)
        asked, found = map(
            config.flatten, (own, settling.settle(own, settings, backend))
        )
        new = {k: v for k, v in found.items() if v != asked[k]}
        if rows := new.get("data.micro_batch_size"):
            new["data.micro_batch_size"] = rows * parts
        return new

    cfg = config.replace(cfg, hosts.once(settled))
    try:
        return trainer.run(cfg, backend)
    except Exception as error:
        if settling.out_of_memory(error):
            raise config.UserError(
                settling.advice(cfg, settings, backend, error)
            ) from error
        raise


def _share(cfg, parts):
    """`cfg` as one of `parts` processes sees it, each with its own rows."""
    sizes = ("data.batch_size", "data.micro_batch_size")
    rows = cfg.data.batch_size, cfg.data.micro_batch_size
    return config.replace(cfg, {k: n // parts for k, n in zip(sizes, rows)})


if __name__ == "__main__":
    runtime.main(train, __doc__)
