"""Curves of training on one device, for `check` to compare.

A Gemma 2 that is small and complete: grouped heads, a window, soft caps that
bite, packed rows with padding.
"""

import contextlib
import time
import traceback
from unittest import mock

import numpy as np

from keras_gemma_ft import config, runtime
from tests.benchmarks import model
from tests.benchmarks.processes import say

# More layers or a higher rate, and steps multiply what rounding began.
STEPS, GAIN, RATE = 20, 4.0, 3e-3


def serve(spec, channel):
    """The process of one backend and device: answers `build` with curves."""
    runtime.start(config.Config(backend=spec["backend"]))
    traced = spec["backend"] == "torch" and not spec["gpu"]
    if traced:
        from tests.benchmarks.gpu import random_model

        random_model.trace()
    found = {}
    for case, settings in spec["cases"].items():
        began = time.monotonic()
        try:
            found[case] = curve(spec, settings)
        except RuntimeError as error:
            # Of a compiler, a driver or the memory: the others can go on.
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            found[case] = {"error": f"{type(error).__name__}: {lines[0][:200]}"}
        say(f"{spec['backend']} {case}: {time.monotonic() - began:.1f} s")
    channel.answer(**found)


def sizes(quick):
    """Heads as wide as 2B's where a GPU's shared memory matters."""
    if quick:
        return model.Sizes(2, 64, 4, 2, 16, 128, 4096, window=48)
    return model.Sizes(3, 256, 4, 2, 256, 512, 4096, window=96)


def batch(words, tokens):
    """Two rows: two examples and padding; one example."""
    ids = model.rows(words, 2, tokens)
    segments = np.ones((2, tokens), "int32")
    positions = np.tile(np.arange(tokens, dtype="int32"), (2, 1))
    cut, end = tokens // 3, tokens - tokens // 8
    segments[0, cut:end], segments[0, end:] = 2, 0
    positions[0, cut:] -= cut
    learned = (segments > 0).astype("float32")
    x = {"token_ids": ids[:, :-1], "segment_ids": segments,
         "positions": positions}  # fmt: skip
    return x, ids[:, 1:], learned / learned.sum()


def curve(spec, case):
    """{"losses", "norms", "attention"} of `STEPS` steps of a case."""
    import keras

    from keras_gemma_ft.tuning import feed
    from tests.benchmarks.gpu import random_model

    cfg = config.replace(
        config.Config(),
        {
            "backend": spec["backend"], "model.dtype": case["dtype"],
            "model.quantize": case.get("quantize", "none"),
            "model.compile": case.get("compile", "on"),
            "lora.style": "standard", "train.learning_rate": RATE,
            "train.schedule": "constant",
        },
    )  # fmt: skip
    shape = sizes(spec["quick"])
    with attention(case.get("attention"), spec["gpu"]):
        tuner = random_model.tuner(cfg, shape, steps=STEPS, gain=GAIN)
        kind = getattr(tuner.blocks, "attention", None)
        notes = {"losses": [], "norms": [], "attention": type(kind).__name__}

        class Note(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                norm = tuner.optimizer.gradient_norm
                norm = float(keras.ops.convert_to_numpy(norm))
                notes["losses"].append(float(logs["loss"]))
                notes["norms"].append(norm)

        data = batch(shape.words, 48 if spec["quick"] else 384)
        tuner.fit(
            feed.Feed([data] * STEPS, tuner.meter), epochs=STEPS,
            steps_per_epoch=1, callbacks=[Note()], shuffle=False, verbose=0,
        )  # fmt: skip
        values = [keras.ops.convert_to_numpy(v).ravel()
                  for v in tuner.trainable_variables]  # fmt: skip
    # A sample of what came of all gradients.
    notes["trained"] = np.concatenate(values)[::11].astype(float).tolist()
    return notes


@contextlib.contextmanager
def attention(kind, gpu):
    """A block in which Torch's compiled attention is `kind`, if one is named.

    On a CPU FlexAttention is its definition: the kernels have no backward pass
    there.
    """
    if kind is None:
        yield
        return
    from torch.nn.attention import flex_attention

    from keras_gemma_ft.model import torch_attention

    def choose(backbone, dtype, cap):
        return getattr(torch_attention, kind)(cap)

    patch = mock.patch.object
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch(torch_attention, "choose", choose))
        if kind == "Flex" and not gpu:
            masks = flex_attention.create_block_mask
            stack.enter_context(
                patch(flex_attention, "_validate_device", lambda *x: None)
            )
            stack.enter_context(patch(torch_attention, "_masks", lambda: masks))
        yield
