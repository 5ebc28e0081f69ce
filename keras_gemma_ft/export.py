"""Turn a tuned model into what others load, and prove that they can.

python -m keras_gemma_ft.export --run_dir=runs/default --format=peft,gguf
python -m keras_gemma_ft.export --adapter=FOLDER --format=merged_hf --to=out
"""

from keras_gemma_ft import runtime


def export(cfg):
    """Returns {"exports": [{"format", "path", "verification", ...}], ...}."""
    runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft.exporting import exports

    return exports.run(cfg)


if __name__ == "__main__":
    runtime.main(export, __doc__)
