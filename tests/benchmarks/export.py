"""Merging a whole Gemma 2: memory beyond what the process starts with, seconds.

    python -m tests.benchmarks.export --size=2b --formats=merged_hf,gguf
    python -m tests.benchmarks.export --size=9b --formats=merged_hf

A base of random numbers in bfloat16 (5.2 GB, 18.5 GB) and an adapter of rank 8
on every layer are written to a temporary folder first; twice that is wanted of
the disk. With --verify=1 what is written is opened again and compared, as
`export` does it, in a process of its own: that needs the model in float32.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from keras_gemma_ft import config
from keras_gemma_ft.formats import adapters, merged, models, names
from tests.benchmarks.model import PRESETS, Sizes
from tests.benchmarks.processes import memory_line


class Random:
    """Random numbers as a reader; layers of a kind share theirs."""

    def __init__(self, backbone):
        self.backbone, self.shapes = backbone, names.variable_shapes(backbone)
        self.paths = list(self.shapes)
        self.pool = np.random.default_rng(0).standard_normal(
            2**22, dtype="float32"
        )

    def read(self, path):
        shape = self.shapes[path]
        fan_in = 1 if path.endswith(("scale", "embeddings")) else shape[-2]
        values = np.resize(self.pool, shape) * np.float32(0.5 / fan_in**0.5)
        return values.astype(ml_dtypes.bfloat16)


def prepare(folder, size):
    """Writes `base` and `adapter` into a folder."""
    from keras_gemma_ft.formats import tokenizer_files
    from keras_gemma_ft.model import preset_source, presets

    backbone = {"query_pre_attn_scalar": 256} | Sizes(*PRESETS[size]).backbone()
    model = Random(backbone)
    base = folder / "base"
    base.mkdir()
    limit = 5 * 10**9
    merged.write_huggingface(
        base,
        model,
        dtype="bfloat16",
        shards=models.split(model, "bfloat16", limit),
    )
    words = presets.tokenizer(preset_source.folder(config.EMBEDDED_PRESET))
    tokenizer_files.write_tokenizer(base, words.proto, chat_template="")
    rng, kernels = np.random.default_rng(0), names.kernel_shapes(backbone)
    weights = {
        (layer, target): tuple(
            rng.normal(0, 0.02, shape).astype("float32")
            for shape in adapters.pair_shapes(
                "keras", target, kernels[target], 8
            )
        )
        for layer in range(backbone["num_layers"])
        for target in config.TARGETS
    }
    adapter = adapters.Adapter(
        "keras", 8, 8.0, False, 0.0, config.TARGETS, weights, str(base)
    )
    adapters.write_peft(folder / "adapter", adapter)


def measure(folder, what):
    """{"seconds", "extra_bytes", "largest_variable"} of writing one format."""
    import os

    from keras_gemma_ft.exporting import exports, sources, writers

    cfg = config.replace(
        config.Config(),
        {
            "preset": str(folder / "base"),
            "adapter": str(folder / "adapter"),
            "export.format": what,
            "export.to": str(folder / "out"),
            "export.verify": False,
        },
    )
    source = sources.open(cfg)
    before = memory_line(os.getpid(), "VmRSS")
    began = time.monotonic()
    exports._one(what, folder / "out" / what, source, cfg)
    assert writers.WRITERS[what]
    shapes = models.shapes(source.base)
    return {
        "format": what,
        "seconds": round(time.monotonic() - began, 1),
        "extra_bytes": memory_line(os.getpid(), "VmHWM") - before,
        "largest_variable": max(int(np.prod(s)) for s in shapes.values()),
        "written": sum(
            p.stat().st_size for p in (folder / "out" / what).iterdir()
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2b")
    parser.add_argument("--formats", default="merged_hf,gguf")
    parser.add_argument("--folder", default="")
    parser.add_argument("--child", default="")
    parser.add_argument("--verify", default=0, type=int)
    told = parser.parse_args()
    if told.child:
        print(json.dumps(measure(pathlib.Path(told.folder), told.child)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        prepare(folder, told.size)
        for what in told.formats.split(","):
            command = [sys.executable, "-m", "tests.benchmarks.export",
                       f"--child={what}", f"--folder={folder}"]  # fmt: skip
            if told.verify:
                command = [
                    sys.executable, "-m", "keras_gemma_ft.export",
                    f"--adapter={folder / 'adapter'}", f"--format={what}",
                    f"--to={folder / 'out'}",
                ]  # fmt: skip
            began = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            print(done.stdout.splitlines()[-1])
            print(f"{time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
