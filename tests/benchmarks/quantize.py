"""A quantised base: what it takes to load one, and to train a step on it.

    python -m tests.benchmarks.quantize --size=2b --backend=torch --mode=nf4
    python -m tests.benchmarks.quantize --size=2b --step=1x256

Writes a Hugging Face folder of random bfloat16 weights (4.9 GB for 2B, in
shards of 1 GB) to a temporary folder, and loads it twice as our commands do,
each time in a process of its own: from the folder, and then from what the
first has kept. --step=ROWSxTOKENS goes on to train one step, all-linear LoRA
of rank 8 and AdamW, blocks recomputed. The last line is JSON: for "cold" and
"cached"

    load_seconds     reading, encoding and placing the weights
    weights_gib      bytes of all tensors that are alive afterwards
    load_peak_gib    the process's largest resident set until then
    peak_gib         the same, the step included
    step_seconds, loss

A file that was just written is still in the system's memory: --drop asks the
system to forget it first, so that "cold" includes reading from the disk.
"""

import argparse
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from keras_gemma_ft import config, embedded, runtime
from keras_gemma_ft.formats import huggingface, names, tensors
from tests.benchmarks import model, processes
from tests.benchmarks.processes import memory_line, say

_SHARD = 2**30
_GIB = 2**30


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", choices=sorted(model.PRESETS), default="2b")
    add("--layers", type=int, default=0, help="instead of the size's own")
    add("--backend", default="torch", choices=config.BACKENDS)
    add("--mode", default="nf4", help="as --model.quantize")
    add("--embedding", default="none", help="as --model.quantize_embedding")
    add("--dtype", default="bfloat16")
    add("--step", default="", help="train one of ROWSxTOKENS, such as 1x256")
    add("--folder", default="", help="keep the weights there, or find them")
    add("--drop", action="store_true", help="read from the disk itself")
    add("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Both runs, in processes of their own."""
    args = flags()
    if args.child:
        return child(json.loads(args.child))
    processes.tidy()
    sizes = list(model.PRESETS[args.size])
    sizes[0] = args.layers or sizes[0]
    sizes = model.Sizes(*sizes)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(args.folder or place) / "model"
        if not folder.exists():
            write(folder, sizes)
        found = {"parameters": sizes.parameters(), **vars(args)}
        for name in ("cold", "cached"):
            if args.drop:
                drop(folder)
            found[name] = run(args, folder, f"{place}/kept")
    print(json.dumps(found))


def write(folder, sizes):
    """Writes a model of random bfloat16 weights, a tensor at a time."""
    need = 2 * sizes.parameters()
    free = shutil.disk_usage(folder.parent).free
    if free < 2 * need:
        raise SystemExit(
            f"{folder.parent} has {free / _GIB:.1f} GiB free; the weights and "
            f"what is kept of them take up to {2 * need / _GIB:.1f}."
        )
    say(f"writing {need / _GIB:.2f} GiB of random weights to {folder}")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**24, "float32")
    held, shard, writer, listed = 0, 0, None, {}
    for path, shape in sizes.shapes().items():
        name, form = names.to_huggingface(path, np.broadcast_to(0, shape))
        if writer is None or held > _SHARD:
            if writer:
                writer.finish({"format": "pt"})
            shard += 1
            file = f"model-{shard:05}.safetensors"
            writer, held = tensors.Writer(folder / file), 0
        array = values(rng, pool, path, shape, form.shape)
        writer.put(name, array)
        listed[name] = file
        held += array.nbytes
    writer.finish({"format": "pt"})
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = huggingface.huggingface_config(
        sizes.backbone(), dtype="bfloat16"
    )
    (folder / "config.json").write_text(json.dumps(settings))
    proto = embedded.preset_folder() / "assets/tokenizer/vocabulary.spm"
    (folder / "tokenizer.model").write_bytes(proto.read_bytes())


def values(rng, pool, path, shape, form):
    """bfloat16 of `form`: a stretch of the pool from anywhere, again and
    again. Of a size at which every layer matters and nothing overflows."""
    if path.endswith("scale"):
        return np.full(form, 0.1, ml_dtypes.bfloat16)
    fan_in = shape[-1] if "embedding" in path else np.prod(shape[:-1])
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        fan_in = shape[1]
    stretch = np.roll(pool, rng.integers(len(pool)))
    stretch = (stretch * np.float32(fan_in**-0.5)).astype(ml_dtypes.bfloat16)
    return np.resize(stretch, form)


def drop(folder):
    """Asks the system to keep nothing of a folder in memory."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(args, folder, kept):
    """What a process of its own says."""
    spec = {**vars(args), "folder": str(folder), "kept": kept}
    command = [
        sys.executable, "-m", "tests.benchmarks.quantize",
        f"--child={json.dumps(spec)}",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **runtime.allocator()},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the run ended with exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    say(str(found))
    return found


def child(spec):
    """Loads, and trains a step if it is asked."""
    rows, tokens = map(int, (spec["step"] or "1x2").split("x"))
    cfg = config.replace(
        config.Config(),
        {
            "preset": spec["folder"], "backend": spec["backend"],
            "model.quantize": spec["mode"], "model.dtype": spec["dtype"],
            "model.quantize_embedding": spec["embedding"],
            "model.quantize_cache": spec["kept"], "model.remat": "block",
            "lora.style": "standard", "data.batch_size": rows,
            "data.sequence_length": tokens,
        },
    )  # fmt: skip
    runtime.start(cfg)
    from keras_gemma_ft.model import presets

    start, began = memory_line(os.getpid(), "VmRSS"), time.monotonic()
    loaded = presets.open(cfg)
    found = {
        "load_seconds": round(time.monotonic() - began, 1),
        "weights_gib": round(alive(spec["backend"], loaded) / _GIB, 3),
        "start_gib": round(start / _GIB, 2),
        "load_peak_gib": round(memory_line(os.getpid(), "VmHWM") / _GIB, 2),
    }
    if spec["step"]:
        found |= train(cfg, loaded, rows, tokens)
    print(json.dumps(found), flush=True)


def alive(backend, loaded):
    """Bytes of the tensors that are there, whoever holds them."""
    gc.collect()
    if backend == "jax":
        import jax

        return sum(x.nbytes for x in jax.live_arrays())
    if backend == "torch":
        import torch

        kinds = (torch.Tensor, torch.nn.Parameter)
        found = [x for x in gc.get_objects() if type(x) in kinds]
        # By storage: a parameter and its view are one.
        return sum(
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
             for x in found if not x.is_meta}.values()
        )  # fmt: skip
    # What is eager in TensorFlow is not listed anywhere.
    variables = loaded.causal_lm.backbone.variables
    return sum(v.value.dtype.size * int(np.prod(v.shape)) for v in variables)


def train(cfg, loaded, rows, tokens):
    """One step of `FineTuner`, built and fitted as a run does it."""
    from keras_gemma_ft.tuning import feed, trainer

    tuner = trainer.build(cfg, loaded, steps=2, warmup=0)
    words = loaded.causal_lm.backbone.vocabulary_size
    row = model.rows(words, rows, tokens)
    places = np.arange(tokens, dtype="int32")
    x = {
        "token_ids": row[:, :-1],
        "segment_ids": np.ones((rows, tokens), "int32"),
        "positions": np.broadcast_to(places, (rows, tokens)).copy(),
    }
    weight = np.full((rows, tokens), 1 / (rows * tokens), "float32")
    began = time.monotonic()
    logs = tuner.fit(
        feed.Feed([(x, row[:, 1:], weight)], tuner.meter),
        epochs=1, steps_per_epoch=1, verbose=0,
    )  # fmt: skip
    return {
        "step_seconds": round(time.monotonic() - began, 1),
        "loss": logs.history["loss"][0],
        "peak_gib": round(memory_line(os.getpid(), "VmHWM") / _GIB, 2),
    }


if __name__ == "__main__":
    main()
