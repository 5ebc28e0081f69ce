"""Fine-tune Gemma 2 with LoRA.

python -m keras_gemma_ft.train
    tunes the embedded model on the embedded task, offline, on any machine.
python -m keras_gemma_ft.train --preset=gemma2_2b_en --data.train=mine.jsonl
    tunes the real one on your records.
"""

from keras_gemma_ft import config, runtime


def train(cfg):
    """Runs `cfg`; returns what summary.json holds."""
    if cfg.adapter:
        raise config.UserError(
            f"--adapter={cfg.adapter} is for evaluate and generate; train "
            f"makes a new adapter. To go on with an interrupted run give its "
            f"--run_dir."
        )
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft.tuning import trainer

    return trainer.run(cfg, backend)


if __name__ == "__main__":
    runtime.main(train, __doc__)
