"""What the package carries itself: a tiny Gemma 2 and a task to tune it on.

`gemma2_tiny_en/` is a preset folder as KerasHub writes one, and the two
`demo_*.jsonl` files are the home assistant task of `demo.py`. Both are made
by modules of this folder, so that anybody can make them again.
"""

import pathlib

from keras_gemma_ft import config

_FOLDER = pathlib.Path(__file__).resolve().parent


def preset_folder():
    """The `pathlib.Path` of the embedded preset, in Keras's own format."""
    return _FOLDER / config.EMBEDDED_PRESET


def demo_file(split):
    """The `pathlib.Path` of a split of the demo task.

    Args:
        split: `"train"` or `"eval"`.

    Raises:
        ValueError: for any other split.
    """
    if split not in ("train", "eval"):
        raise ValueError(
            f"There is no demo split {split!r}. Use 'train' or 'eval'."
        )
    return _FOLDER / f"demo_{split}.jsonl"
