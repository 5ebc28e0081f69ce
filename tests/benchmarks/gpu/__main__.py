"""One NVIDIA card: who is how fast on it, and in how many bytes.

    python -m tests.benchmarks.gpu                       # the table, 8 minutes
    python -m tests.benchmarks.gpu --rows=4x1024,2x4096 --contenders=ours-torch
    python -m tests.benchmarks.gpu --check               # equality on the card
    python -m tests.benchmarks.gpu --launches            # kernels of a block
    python -m tests.benchmarks.gpu --device=cpu --quick    # a rehearsal

Gemma 2 2B and 9B of random weights, which each process makes for itself: no
network, no files. All-linear LoRA of rank 8, AdamW, every token learned, in
16 bits: bfloat16, or float16 where the card has none. Ours on Torch and JAX,
stock KerasHub, transformers + PEFT eager (checkpointing where blocks are
recomputed), with Liger's kernels and with bitsandbytes' 4 bits if they are
installed. Needs keras, keras-hub, grain and one of torch and jax.

Contenders fill the card's memory side by side, as many as fit and as the
host's cores can get ready at once (--together; 1 is one after the other). A
number is the median of --repeats steps, taken in turn while the others wait.
`first step` is with its compilation, in company, and with what earlier runs
have left in the caches. `peak GiB` is the device's own count, weights
included, after two steps; JAX's counts from the process's start. `share` is of
the data sheet's FLOP/s, attention counted. What --budget does not reach is
said to be left out; --rows and --contenders choose.

Prints Markdown, and as the last line JSON: card, driver, versions, command,
results (every number), ratios, check, launches.
"""

import argparse
import os
import shlex
import sys
import time

from tests.benchmarks.gpu import check, launches, plan, report, table
from tests.benchmarks.processes import tidy


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--table", action="store_true", help="also with --check, --launches")
    add("--check", action="store_true", help="instead of the table: equality")
    add("--launches", action="store_true", help="instead: kernels of a block")
    add("--device", default="auto", choices=("auto", "cpu"))
    add("--dtype", default="auto", help="as --model.dtype")
    add("--quick", action="store_true", help="a tiny model, few steps")
    add("--rows", default=",".join(plan.ROWS))
    add("--contenders", default=",".join(plan.CONTENDERS))
    add("--backends", default="torch,jax", help="of --check: ours on these")
    add("--budget", type=float, help="seconds of the table: 460, quick 100")
    add("--together", type=int, default=0, help="processes; 0 picks by cores")
    add("--repeats", type=int, default=7, help="steps counted")
    add("--burst", type=int, default=1, help="steps a turn, without waiting")
    add("--limit_gib", type=float, default=0.0, help="of a process on the host")
    add("--no_demo", action="store_true", help="of --check: leave the demo out")
    return parser


def read(argv):
    """The arguments, lists taken apart and checked."""
    parser = flags()
    args = parser.parse_args(argv)
    for name, known in (
        ("rows", plan.ROWS),
        ("contenders", plan.CONTENDERS),
        ("backends", ("torch", "jax")),
    ):
        asked = getattr(args, name).split(",")
        if wrong := [x for x in asked if x not in known]:
            parser.error(f"--{name}={','.join(wrong)}: of {', '.join(known)}")
        setattr(args, name, asked)
    if args.budget is None:
        args.budget = 100.0 if args.quick else 460.0
    args.table = args.table or not (args.check or args.launches)
    # Compiling takes about two cores of the host.
    args.together = args.together or max(2, (os.cpu_count() or 1) // 2)
    return args


def main():
    """Does what is asked; prints tables, then the line."""
    args, began = read(sys.argv[1:]), time.monotonic()
    tidy()
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    # One card, also where there are more.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    card = report.card(args.device, args.dtype)
    found = {}
    if args.table:
        found["results"] = table.fill(args, card)
        found["ratios"] = report.ratios(found["results"])
        print(report.markdown(found["results"]) + "\n", flush=True)
    if args.launches:
        found["launches"] = launches.count(args, card)
        print(launches.markdown(found["launches"]) + "\n", flush=True)
    if args.check:
        found["check"] = check.run(args, card)
        print(check.markdown(found["check"]) + "\n", flush=True)
    command = ["python", "-m", "tests.benchmarks.gpu", *sys.argv[1:]]
    print(
        report.line(
            card=card, versions=report.versions(), command=shlex.join(command),
            settings=vars(args), seconds=round(time.monotonic() - began, 1),
            **found,
        )
    )  # fmt: skip
    # A table has no wrong answer; equality has.
    failed = [c["what"] for c in found.get("check", ()) if c["ok"] is False]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
