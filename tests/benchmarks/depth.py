"""What depth costs JAX: blocks unrolled, and as one loop (--model.scan).

    python -m tests.benchmarks.depth --layers=8,26,42

Compiles the very train step of `FineTuner`, recomputing each block, for this
machine, each in a process of its own. Prints a table to stderr, and one line
of JSON: for each number of layers and each of "on" and "off" the seconds of
tracing and of compiling, the process's peak of memory, and the compiler's own
bytes of temporaries on the device.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from keras_gemma_ft import config, runtime
from tests.benchmarks import model
from tests.benchmarks.processes import ROOT, table


def flags():
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.depth")
    add = parser.add_argument
    add("--layers", default="8,26,42")
    add("--hidden", type=int, default=512)
    add("--tokens", type=int, default=512)
    add("--rows", type=int, default=2)
    add("--worker", help="internal: on or off")
    return parser


def main():
    """Measures; prints the table and the line."""
    args = flags().parse_args()
    if args.worker:
        print(json.dumps(compiled(args)))
        return
    found = {}
    for layers in args.layers.split(","):
        for scan in ("off", "on"):
            command = [
                sys.executable, "-m", "tests.benchmarks.depth",
                f"--layers={layers}", f"--hidden={args.hidden}",
                f"--tokens={args.tokens}", f"--rows={args.rows}",
                f"--worker={scan}",
            ]  # fmt: skip
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True,
                env={**os.environ, "KERAS_BACKEND": "jax"},
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found[f"{layers} {scan}"] = json.loads(done.stdout.split("\n")[-2])
    names = list(next(iter(found.values())))
    rows = [[name, *values.values()] for name, values in found.items()]
    table(["layers, scan", *names], rows)
    print(json.dumps(found))


def compiled(args):
    """The costs of one compilation."""
    sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
    import keras_hub

    from keras_gemma_ft.planning import program
    from keras_gemma_ft.tuning import trainer

    layers = int(args.layers)
    sizes = model.Sizes(
        layers, args.hidden, 8, 4, args.hidden // 8, 4 * args.hidden, 4096
    )
    backbone = keras_hub.models.GemmaBackbone(**sizes.backbone())
    loaded = argparse.Namespace(
        causal_lm=keras_hub.models.GemmaCausalLM(backbone=backbone)
    )
    cfg = config.replace(
        config.Config(),
        {"model.remat": "block", "model.scan": args.worker, "lora.rank": 8},
    )
    tuner = trainer.build(cfg, loaded, steps=100, warmup=1)
    ids = model.rows(sizes.words, args.rows, args.tokens)
    ones = ids[:, 1:] * 0 + 1
    x = {"token_ids": ids[:, :-1], "segment_ids": ones, "positions": ones}
    batch = x, ids[:, 1:], ones.astype("float32")
    began = time.perf_counter()
    lowered = program.lower(tuner, batch)
    traced = time.perf_counter()
    used = lowered.compile().memory_analysis()
    ended = time.perf_counter()
    return {
        "trace_s": round(traced - began, 1),
        "compile_s": round(ended - traced, 1),
        "host_MiB": runtime.peak_memory_bytes() // 2**20,
        "temporary_MiB": used.temp_size_in_bytes // 2**20,
        "argument_MiB": used.argument_size_in_bytes // 2**20,
    }


if __name__ == "__main__":
    main()
