"""How long a user waits before a verb begins, on the embedded model.

    python -m tests.benchmarks.start_up --backend=torch

Times whole commands: `--help`, the refusal of a flag that does not exist, and
`generate` with one prompt. Prints one line of JSON with the median of --repeats
for each; one run before them fills the caches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from tests.benchmarks.processes import ROOT, say

# name: (arguments of `generate`, its exit code)
COMMANDS = {
    "help_s": (["--help"], 0),
    "refusal_s": (["--generate.promt=Hi"], 2),
    "generate_s": (["--generate.prompt=set a timer for 5 minutes"], 0),
}


def main():
    """Measures; prints the line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.start_up")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    line = {"backend": args.backend}
    for name, (flags, code) in COMMANDS.items():
        flags = [f"--backend={args.backend}", *flags]
        times = [measure(flags, code) for _ in range(1 + args.repeats)]
        line[name] = round(statistics.median(times[1:]), 2)
    print(json.dumps(line))


def measure(flags, code):
    """Seconds of a `generate` that must end with this exit code."""
    command = [sys.executable, "-m", "keras_gemma_ft.generate", *flags]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != code:
        raise SystemExit(done.stderr[-2000:])
    say(f"{' '.join(flags)}: {seconds:.2f} s")
    return seconds


if __name__ == "__main__":
    main()
