"""From the command to the first finished step: the embedded model on a CPU.

    python -m tests.benchmarks.first_step --backend=jax

Runs `python -m keras_gemma_ft.train` with an empty cache folder, then again
with what that left there, and times each to the end of its first step. Prints
one line of JSON: cold_s, warm_s (the median of --repeats).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.processes import ROOT, say


def main():
    """Measures; prints the line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.first_step")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = [
            measure(args.backend, folder, number)
            for number in range(1 + args.repeats)
        ]
    line = {
        "backend": args.backend,
        "cold_s": round(times[0], 2),
        "warm_s": round(statistics.median(times[1:]), 2),
    }
    print(json.dumps(line))


def measure(backend, folder, number):
    """Seconds from the process's start to the first line of its metrics."""
    run_dir = os.path.join(folder, f"run{number}")
    metrics = os.path.join(run_dir, "metrics.jsonl")
    command = [
        sys.executable, "-m", "keras_gemma_ft.train", f"--backend={backend}",
        f"--run_dir={run_dir}", "--train.steps=1", "--train.log_every=1",
        "--train.samples=0", "--train.exact_match=0", "--train.eval_every=0",
        "--data.eval=",
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": folder}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        if os.path.exists(metrics) and os.path.getsize(metrics):
            break
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    _, log = process.communicate()
    if process.returncode:
        raise SystemExit(log[-2000:])
    say(f"run {number}: {seconds:.2f} s")
    return seconds


if __name__ == "__main__":
    main()
