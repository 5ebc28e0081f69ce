"""One optimizer step: ours, stock KerasHub's, transformers + PEFT's.

    python -m tests.benchmarks.step --backend=jax,torch --against=stock,peft

Builds one Gemma 2 of random weights, the same LoRA targets and rank, the same
rows (full, every token learned), AdamW at a constant rate without clipping,
and lets the contenders take one step in turn, each in a process of its own,
so that ratios are of one run. Prints a table to stderr, and one line of JSON:

    ratio_stock, ratio_peft    token/s, ours over theirs
    memory_ratio_stock, _peft  peak memory, ours over theirs
    tokens_per_s               ours
    loss_difference            largest |ours - stock| of the loss curves
    loss_difference_peft       with --style=standard: both start alike
    contenders                 all that was measured

A value is a number, or {backend: number} if several backends were named.
Medians after the warm-up; `cpu_ms` is the time of all cores together. Peak
memory is that of the steps after the warm-up: of the device on a GPU, else of
the process, libraries included; `extra` is what the steps add to what lay
there before the first of them: programs and the optimizer's state too, and
what malloc keeps of blocks under 32 MB.

Stock and ours have a step of Keras's `fit`; stock never recomputes. PEFT
always has plain rank --rank, as its users type it, which is less work than
the rank heads * r that equals --style=keras: its loss curve is compared under
--style=standard only, stock's under --style=keras only. Memory on a GPU counts
from the process's start under JAX, which has no reset. `floor_share` is the
time that the matmuls nobody gets around (`model.Sizes.floor_flops`) would take
at the rate measured by --measure_matmul, over the step's.
"""

import argparse
import json
import math
import statistics
import tempfile

from keras_gemma_ft import config
from tests.benchmarks import model
from tests.benchmarks.processes import Worker, table, tidy

# Which style of ours begins with the same adapter as they do.
STARTS_LIKE = {"stock": "keras", "peft": "standard"}


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model.add_flags(parser, model.SMALL)
    add = parser.add_argument
    add("--size", choices=sorted(model.PRESETS), help="instead of these shapes")
    add("--against", default="stock,peft", help="stock,peft or none")
    add("--peft_attention", default="eager", help="as transformers has it")
    add("--rows", type=int, default=4)
    add("--tokens", type=int, default=256, help="of a row")
    add("--style", default="keras", choices=("keras", "standard"))
    add("--remat", default="none", choices=("none", "block", "auto"))
    add("--warmup", type=int, default=2, help="turns not counted")
    add("--repeats", type=int, default=7, help="turns counted, at least 5")
    add("--burst", type=int, default=1, help="steps a turn, without waiting")
    add("--loss_steps", type=int, default=0, help="turns compared by loss")
    add("--learning_rate", type=float, default=1e-3)
    add("--alone", action="store_true", help="one after another, not in turn")
    add("--stock_accuracy", action="store_true", help="stock's default metric")
    add("--measure_matmul", action="store_true")
    add("--peak_tflops", type=float, default=0.0, help="of the device")
    add("--limit_gib", type=float, default=0.0, help="ends larger processes")
    return parser


def main():
    """Measures; prints the table and the line."""
    args = flags().parse_args()
    tidy()
    if args.repeats < 5:
        flags().error(f"--repeats={args.repeats}: a median wants at least 5")
    for backend in args.backend.split(","):
        if backend not in config.BACKENDS:
            flags().error(f"--backend={backend}: one of {config.BACKENDS}")
    sizes = model.Sizes.of(args)
    if args.size:
        sizes = model.Sizes(*model.PRESETS[args.size])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.write(f"{folder}/model", sizes, dtype=args.dtype, seed=args.seed)
        specs = plan(args, sizes, folder)
        groups = [[n] for n in specs] if args.alone else [list(specs)]
        for group in groups:
            found |= measure(args, sizes, {n: specs[n] for n in group})
    report(args, sizes, found)


def turns(args):
    """Turns of each contender."""
    return max(args.warmup + args.repeats, args.loss_steps)


def plan(args, sizes, folder):
    """{name: spec} of the contenders; ours first: PEFT takes its start."""
    common = {
        "module": "contenders",
        "folder": f"{folder}/model",
        "sizes": vars(sizes),
        "total": turns(args) * args.burst,
        # PEFT's own style only: the other's rank is not what its users type.
        "adapter": f"{folder}/adapter" if args.style == "standard" else "",
    } | vars(args)
    backends, against = args.backend.split(","), args.against.split(",")
    specs = {}
    for backend in backends:
        specs[f"ours {backend}"] = {"kind": "ours", "backend": backend}
    if "stock" in against:
        for backend in backends:
            specs[f"stock {backend}"] = {"kind": "stock", "backend": backend}
    if "peft" in against:
        remat = args.remat
        if remat == "auto":
            remat = "block" if sizes.parameters() > 5e8 else "none"
        for kind in args.peft_attention.split(","):
            specs[f"peft {kind}"] = {
                "kind": "peft", "attention": kind, "remat": remat,
                "backend": "torch",
            }  # fmt: skip
    return {name: common | spec for name, spec in specs.items()}


def measure(args, sizes, specs):
    """{name: dict of what was measured}, one turn of each after the other."""
    workers, found = {}, {}
    tokens = args.rows * args.tokens
    shapes = [[tokens, sizes.hidden], [sizes.hidden, sizes.ffw]]
    try:
        for name, spec in specs.items():
            limit = int(args.limit_gib * 2**30)
            workers[name] = Worker(name, spec, limit=limit)
            workers[name].build()
            found[name] = {"seconds": [], "cpu": [], "losses": []}
        for turn in range(turns(args)):
            for name, worker in workers.items():
                if turn == args.warmup:
                    worker.attempt("reset")
                if answer := worker.attempt("step"):
                    found[name]["seconds"].append(answer["seconds"])
                    found[name]["cpu"].append(answer["cpu_seconds"])
                    found[name]["losses"].append(answer["loss"])
        for name, worker in workers.items():
            found[name]["memory"] = worker.attempt("memory")
            if args.measure_matmul:
                answer = worker.attempt("matmul", shapes=shapes)
                found[name]["matmul"] = answer and answer["flops_per_s"]
            found[name] |= {"built": worker.built, "error": worker.error}
    finally:
        for worker in workers.values():
            worker.close()
    return found


def summary(args, sizes, found):
    """One contender's numbers; only the error if it failed."""
    if found["error"]:
        return {"error": found["error"]}
    tokens = args.rows * args.tokens
    counted = found["seconds"][args.warmup :]
    seconds, cpu = statistics.median(counted), found["cpu"][args.warmup :]
    floor, memory = sizes.floor_flops(tokens), found["memory"]
    result = {
        "step_ms": round(1000 * seconds, 2),
        "fastest_ms": round(1000 * min(counted), 2),
        "cpu_ms": round(1000 * statistics.median(cpu), 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_bytes": memory["peak"],
        "extra_bytes": memory["peak"] - found["built"]["now"],
        "whole_peak_bytes": memory["whole_peak"],
        "peak_of": memory["where"],
        "trained": found["built"]["trained"],
        "idle_cpu_s": round(memory["idle_cpu_s"], 3),
        "first_step_s": round(found["seconds"][0], 2),
        "floor_tflops_per_s": round(floor / seconds / 1e12, 4),
        "losses": found["losses"],
    }
    if found.get("matmul"):
        result["matmul_tflops_per_s"] = round(found["matmul"] / 1e12, 4)
        result["floor_share"] = round(floor / seconds / found["matmul"], 3)
    if args.peak_tflops:
        used = floor + sizes.attention_flops(args.rows, args.tokens)
        share = used / seconds / (args.peak_tflops * 1e12)
        result["peak_share"] = round(share, 3)
    return result


def report(args, sizes, found):
    """The table on stderr, the line on stdout."""
    all_of = {n: summary(args, sizes, f) for n, f in found.items()}
    keys = [
        "step_ms", "cpu_ms", "tokens_per_s", "peak MiB", "extra MiB",
        "first loss", "last loss", "floor_share", "peak_share",
    ]  # fmt: skip
    rows = []
    for name, values in all_of.items():
        shown = {"step_ms": "failed"}
        if "error" not in values:
            shown = values | {
                "peak MiB": round(values["peak_bytes"] / 2**20),
                "extra MiB": round(values["extra_bytes"] / 2**20),
                "first loss": f"{values['losses'][0]:.5f}",
                "last loss": f"{values['losses'][-1]:.5f}",
            }
        rows.append([name, *[shown.get(key, "-") for key in keys]])
    table(["", *keys], rows)
    line = {}
    for backend in args.backend.split(","):
        for key, value in compare(args, all_of, backend).items():
            line.setdefault(key, {})[backend] = value
    if len(args.backend.split(",")) == 1:
        line = {key: value[args.backend] for key, value in line.items()}
    elif len(speeds := line.get("tokens_per_s", {}).values()) > 1:
        line["backends_apart"] = round(max(speeds) / min(speeds), 3)
    shape = vars(sizes) | {"rows": args.rows, "tokens": args.tokens}
    line |= {"shape": shape, "settings": vars(args), "contenders": all_of}
    print(json.dumps(line), flush=True)


def compare(args, all_of, backend):
    """What the line holds of one backend."""
    ours = all_of[f"ours {backend}"]
    if "error" in ours:
        return {"error": ours["error"]}
    line = {"tokens_per_s": ours["tokens_per_s"]}
    peft = f"peft {args.peft_attention.split(',')[0]}"
    for kind, name in (("stock", f"stock {backend}"), ("peft", peft)):
        theirs = all_of.get(name, {"error": "not asked for"})
        if "error" in theirs:
            continue
        speed = ours["tokens_per_s"] / theirs["tokens_per_s"]
        line[f"ratio_{kind}"] = round(speed, 3)
        if ours["peak_of"] == theirs["peak_of"]:
            memory = ours["peak_bytes"] / theirs["peak_bytes"]
            line[f"memory_ratio_{kind}"] = round(memory, 3)
        if args.loss_steps and args.style == STARTS_LIKE[kind]:
            key = "loss_difference" + ("" if kind == "stock" else "_peft")
            line[key] = difference(ours, theirs, args.loss_steps)
    return line


def difference(ours, theirs, steps):
    """Largest difference of two loss curves; None where one is not finite."""
    pairs = list(zip(ours["losses"], theirs["losses"]))[:steps]
    apart = [abs(a - b) for a, b in pairs]
    return max(apart) if all(map(math.isfinite, apart)) else None


if __name__ == "__main__":
    main()
