"""Measures what `plan` lists: batches of contenders, in turn on the clock.

A batch fits into the card's memory side by side, each contender in a process
of its own. All of a batch get ready at once, which is compiling on the host,
and are then timed step by step in turn, while the others wait.
"""

import concurrent.futures
import math
import os
import statistics
import time

from tests.benchmarks.gpu import plan
from tests.benchmarks.processes import Worker, say

WARMUP, OUT = 2, "out of memory"
_GIB = 2**30
# What is only a rehearsal is not worth optimising.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0 "
         "--xla_llvm_disable_expensive_passes=true"}  # fmt: skip
# What a batch is taken to need as long as none has been: 2B on an H200.
_BATCH_SECONDS = 100


def fill(args, card):
    """[result]: one dict for each row and contender asked for, in order.

    Args:
        args: of the command line.
        card: of `report.card`.
    """
    end = time.monotonic() + args.budget
    found, waiting = [], []
    for row, name, gib in plan.ORDER:
        if row in args.rows and name in args.contenders:
            entry = {"row": row, "contender": name, "expected_gib": gib}
            entry["left_out"] = _reason(args, card, name, gib)
            found.append(entry)
            if not entry["left_out"]:
                waiting.append(entry)
    longest = 0.0
    while waiting:
        batch = _together(args, card, waiting)
        left = end - time.monotonic()
        if left < (longest or min(_BATCH_SECONDS, args.budget / 4)):
            for entry in waiting:
                entry["left_out"] = "the budget is used up (--budget)"
            break
        waiting = waiting[len(batch) :]
        began = time.monotonic()
        names = ", ".join(f"{e['row']} {e['contender']}" for e in batch)
        say(f"[{left:4.0f} s left] {names}")
        measure(args, card, batch, end)
        if len(batch) > 1:
            # Alone it may fit.
            again = [e for e in batch if e.get("error") == OUT]
            for entry in again:
                entry["alone"] = True
                del entry["error"]
            waiting = again + waiting
        longest = max(longest, time.monotonic() - began)
    return found


def _reason(args, card, name, gib):
    """Why a contender does not start; None if it does."""
    reason = plan.missing(name, card["gpu"])
    if reason is None and card["gpu"] and not args.quick:
        if gib * _GIB > card["memory"]:
            reason = f"takes about {gib} GiB"
    return reason


def _together(args, card, waiting):
    """How many of those that wait next are ready at once: they themselves."""
    room, count = 0.9 * card["memory"], 0
    for entry in waiting[: args.together]:
        room -= (entry["expected_gib"] + 0.6) * _GIB  # 0.6: CUDA's context
        full = (card["gpu"] and room < 0) or "alone" in entry
        if count and full:
            break
        count += 1
        if "alone" in entry:
            break
    return waiting[:count]


def spec(args, card, entry, together):
    """What the process of an entry is told."""
    row = plan.ROWS[entry["row"]]
    sizes, rows, tokens = plan.sizes(row, args.quick)
    found = {
        "module": "gpu.contenders",
        "folder": "random",
        "sizes": vars(sizes),
        "rows": rows,
        "tokens": tokens,
        "remat": row.remat,
        "seed": 0,
        "rank": 8,
        "targets": "all-linear",
        "style": "standard",
        "adapter": "",
        "learning_rate": 1e-3,
        "dtype": card["dtype"],
        "burst": args.burst,
        "total": (WARMUP + args.repeats) * args.burst,
        **plan.CONTENDERS[entry["contender"]],
    }
    threads = max(1, (os.cpu_count() or 1) // together)
    found["environment"] = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    if args.quick:
        found["environment"] |= QUICK
    if found["kind"] == "stock":
        # It knows neither.
        found |= {"style": "keras", "remat": "none"}
    if found["kind"] == "ours" and not card["gpu"] and args.quick:
        if found["backend"] == "torch" and found.get("compile") != "off":
            found |= {"compile": "on", "traced": True}
    return found


def measure(args, card, batch, end):
    """Fills the entries of a batch with what was measured, or the error."""
    limit = int(args.limit_gib * _GIB)
    workers = [
        Worker(
            f"{entry['row']} {entry['contender']}",
            spec(args, card, entry, len(batch)),
            limit=limit, deadline=end,
        )
        for entry in batch
    ]  # fmt: skip
    try:
        with concurrent.futures.ThreadPoolExecutor(len(batch)) as pool:
            ready = list(pool.map(prepare, workers))
        for worker in workers:
            worker.attempt("reset")
        turns = [[] for _ in workers]
        for _ in range(args.repeats):
            for worker, steps in zip(workers, turns):
                if answer := worker.attempt("step"):
                    steps.append(answer)
        for worker, entry, first, steps in zip(workers, batch, ready, turns):
            memory = worker.attempt("memory")
            if worker.error:
                entry["error"] = verdict(worker.error)
            else:
                entry |= summary(entry, args, card, first, steps, memory)
                # Which attention the compiled block of Torch has.
                entry["attention"] = worker.built.get("attention")
    finally:
        for worker in workers:
            worker.close()


def prepare(worker):
    """Builds, takes the steps that are not counted; (build seconds, steps)."""
    began = time.monotonic()
    worker.build()
    built = time.monotonic() - began
    return built, [worker.attempt("step") for _ in range(WARMUP)]


def verdict(error):
    """What an error says in a table."""
    signs = ("outofmemory", "out of memory", "resource exhausted",
             "alloc failed", "can't allocate", "memoryerror")  # fmt: skip
    text = error.lower().replace("_", " ")
    return OUT if any(sign in text for sign in signs) else error


def summary(entry, args, card, ready, steps, memory):
    """One contender's numbers."""
    row = plan.ROWS[entry["row"]]
    sizes, rows, tokens = plan.sizes(row, args.quick)
    built, warm = ready
    seconds = statistics.median(step["seconds"] for step in steps)
    losses = [step["loss"] for step in (*warm, *steps)]
    found = {
        "step_ms": round(1000 * seconds, 2),
        "fastest_ms": round(1000 * min(s["seconds"] for s in steps), 2),
        "slowest_ms": round(1000 * max(s["seconds"] for s in steps), 2),
        "steps": len(steps),
        "tokens_per_s": round(rows * tokens / seconds, 1),
        "peak_gib": round(memory["peak"] / _GIB, 3),
        "whole_peak_gib": round(memory["whole_peak"] / _GIB, 3),
        "peak_of": memory["where"],
        "build_s": round(built, 1),
        "first_step_s": round(warm[0]["seconds"], 3),
        "losses": losses,
        "finite": all(map(math.isfinite, losses)),
    }
    flops = sizes.floor_flops(rows * tokens)
    flops += sizes.attention_flops(rows, tokens)
    found["tflops_per_s"] = round(flops / seconds / 1e12, 4)
    if card["flops"]:
        found["share"] = round(flops / seconds / card["flops"], 3)
    return found
