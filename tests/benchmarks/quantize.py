"""A quantised 2B: how long it takes to load, and what it takes to train.

    python -m tests.benchmarks.quantize --size=2b --backend=torch --mode=nf4

Writes a Hugging Face folder of random bfloat16 weights (4.9 GB for 2B) to a
temporary folder, then has `python -m keras_gemma_ft.train` take one optimizer
step of --tokens on it, all-linear LoRA of rank 8, in a process of its own, as
a user would: once with nothing kept from an earlier run, once again. Ends with
one line of JSON, for each of the two:

    load_seconds     reading, encoding and placing the weights
    weights_gib      what they take, as they are stored
    peak_gib         the process's largest resident set, loading included
    loss             of the step, to see that there was one
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from tests.benchmarks import model
from tests.benchmarks.processes import ROOT, say


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
    add("--backend", default="torch", help="jax, tensorflow or torch")
    add("--mode", default="nf4", help="as --model.quantize")
    add("--dtype", default="bfloat16")
    add("--tokens", type=int, default=256)
    add("--folder", default="", help="keep the weights there, or find them")
    return parser.parse_args()


def main():
    args = flags()
    sizes = list(model.PRESETS[args.size])
    sizes[0] = args.layers or sizes[0]
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(args.folder or place) / "model"
        if not folder.exists():
            say(f"writing random weights to {folder}")
            folder.mkdir(parents=True)
            model.write(folder, model.Sizes(*sizes), dtype="bfloat16", seed=0)
        found = {
            name: run(args, folder, place, name) for name in ("first", "again")
        }
    print(json.dumps(found))


def run(args, folder, place, name):
    """One run of `train`: its numbers."""
    command = [
        sys.executable, "-m", "keras_gemma_ft.train", f"--preset={folder}",
        f"--backend={args.backend}", f"--run_dir={place}/{name}",
        f"--model.quantize={args.mode}", f"--model.dtype={args.dtype}",
        "--model.remat=block", f"--data.sequence_length={args.tokens}",
        "--data.batch_size=1", "--data.eval=none", "--train.steps=1",
        "--train.samples=0", "--train.exact_match=0", "--lora.style=standard",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": f"{place}/cache"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    say(done.stderr)
    lines = {
        word: re.search(rf"\[ *([\d.]+)s\] {word}.*", done.stderr)
        for word in ("dtype", "weights")
    }
    summary = json.loads(done.stdout.splitlines()[-1])
    weights = re.search(r"weights: ([\d.]+) (GiB|MiB)", lines["weights"][0])
    unit = 1 if weights[2] == "GiB" else 1024
    return {
        "load_seconds": round(
            float(lines["weights"][1]) - float(lines["dtype"][1]), 1
        ),
        "weights_gib": float(weights[1]) / unit,
        "peak_gib": round(summary["peak_memory_bytes"] / 2**30, 2),
        "loss": summary["train_loss"],
        "seconds": summary["seconds"],
    }


if __name__ == "__main__":
    main()
