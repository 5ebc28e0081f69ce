"""A GPU's plan against a stand-in on this CPU, part by part. Torch.

    python -m tests.benchmarks.plan_parts --cases=t4_2b_float16,t4_2b_nf4
    python -m tests.benchmarks.plan_parts --compile=on

Each case is a plan for a card, and a model of an eighth of its widths and words
in the same quantisation that takes steps here, in a process of its own. It
computes in float32, because CPUs without instructions for 16 bits make float32
copies for every product, and its head takes words all at once, as in 16 bits. What tensors are alive when, PyTorch counts and its profiler records. Four
bytes are compared: what lies there between steps, what the forward pass keeps,
what the head adds to it, and what the backward pass adds. Each is planned for
the stand-in, too; measured over planned, applied to the plan at full size, says
what a run would take there.

FlexAttention has no CPU: here scores are formed, and planned. Prints a table to
stderr and one line of JSON.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

from keras_gemma_ft import config
from keras_gemma_ft.model import presets
from keras_gemma_ft.planning import (
    devices,
    memory,
    program,
    shapes,
    step,
)
from keras_gemma_ft.tuning import loss, trainer
from tests.benchmarks import model
from tests.benchmarks.processes import ROOT, say, table

SMALLER, LAYERS = 8, 4
# size, device, dtype, quantize, remat, rows, tokens
CASES = {
    "t4_2b_float16": ("2b", "t4", "float16", "none", "none", 2, 512),
    "t4_2b_nf4": ("2b", "t4", "float16", "nf4", "block", 2, 512),
    "24gb_9b_nf4": ("9b", "l4", "bfloat16", "nf4", "block", 2, 512),
}


def main():
    """Measures; prints the table and the line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.plan_parts")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--compile", default="off", choices=("off", "on"))
    parser.add_argument("--child", default="", help="internal")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.child, args.compile)))
        return
    rows, found = [], {}
    for case in args.cases.split(","):
        found[case] = one = compared(case, args.compile)
        for part in one["parts"].items():
            rows.append([case, part[0], *(f"{x / 2**20:.1f}" for x in part[1])])
        rows.append(
            [case, "at full size", *(f"{one[x] / 2**20:.0f}" for x in
             ("stand_in", "plan")), f"{one['error']:+.0%}"]
        )  # fmt: skip
        say(f"{rows[-1]}")
    table(
        ["", "", "measured MiB", "planned", ""],
        [[*row, ""][:5] for row in rows],
    )
    print(json.dumps(found))


def sizes(case):
    """`model.Sizes` of the case's stand-in."""
    full = shapes.known(CASES[case][0])
    return model.Sizes(
        LAYERS,
        full["hidden_dim"] // SMALLER,
        full["num_query_heads"],
        full["num_key_value_heads"],
        full["head_dim"] // SMALLER,
        full["intermediate_dim"] // 2 // SMALLER,
        full["vocabulary_size"] // SMALLER,
    )


def settings(case, compiled, folder="", dtype="float32"):
    """`config.Config` of a case; of its stand-in, unless `dtype` is said."""
    *_, quantize, remat, rows, tokens = CASES[case]
    return config.replace(
        config.Config(),
        {
            "backend": "torch",
            "preset": folder,
            "data.batch_size": rows,
            "data.sequence_length": tokens,
            "model.dtype": dtype,
            "model.quantize": quantize,
            "model.remat": remat,
            "model.compile": compiled,
        },
    )


def planned(case, compiled, full):
    """{"lying", "kept", "head", "back"} of a plan, bytes."""
    size, device, dtype, _, remat, *_ = CASES[case]
    if not full:
        dtype = "float32"
    one = step.of(
        settings(case, compiled, dtype=dtype),
        shapes.known(size) if full else sizes(case).backbone(),
        devices.device(device) if full else devices.cpu(),
        (1, 1), dtype=dtype, recompute=remat == "block", backend="torch",
    )  # fmt: skip
    found = memory.parts(one)
    return {
        "lying": sum(found[k] for k in ("weights", "adapters", "optimizer")),
        "kept": found["kept"],
        "head": memory.logits(one),
        "back": memory.work(one) + found["gradients"],
    }


def compared(case, compiled):
    """A case: {"parts": {part: (measured, planned)}, "stand_in", "plan"}."""
    command = [sys.executable, "-m", "tests.benchmarks.plan_parts"]
    done = subprocess.run(
        [*command, f"--child={case}", f"--compile={compiled}"],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "torch"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    took = json.loads(done.stdout.splitlines()[-1])
    by_words, memory._by_words = memory._by_words, lambda step: False
    small = planned(case, compiled, False)
    memory._by_words = by_words
    full = planned(case, compiled, True)
    scaled = {part: took[part] / small[part] * full[part] for part in took}
    stand_in, plan = peak(scaled), peak(full)
    return {
        "parts": {part: (took[part], small[part]) for part in took},
        "stand_in": stand_in, "plan": plan, "error": plan / stand_in - 1,
    }  # fmt: skip


def peak(parts):
    """What a step takes of its parts: the head is over before the rest."""
    return parts["lying"] + parts["kept"] + max(parts["head"], parts["back"])


# --- in a process of its own ---------------------------------------------------


def measured(case, compiled):
    """What steps of the stand-in take: as `planned`."""
    loss._by_words = lambda *args: False
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(case, compiled, folder)
        model.write(folder, sizes(case), dtype=cfg.model.dtype)
        loaded = presets.open(cfg)
        tuner = trainer.build(cfg, loaded, steps=4, warmup=1)
    shape = cfg.data.batch_size, cfg.data.sequence_length
    batch = program.batch(lambda kind: np.ones(shape, kind))
    for _ in range(2):
        tuner.train_on_batch(*batch)
    for variable in tuner.trainable_variables:
        variable.value.grad = None
    gc.collect()
    return {"lying": alive(), **profiled(tuner, batch)}


def alive():
    """Bytes of all tensors that Python can reach."""
    import torch

    found = {}
    for one in gc.get_objects():
        # The compiler's stand-ins for tensors hold nothing.
        real = type(one) in (torch.Tensor, torch.nn.Parameter)
        if real and one.device.type != "meta":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def profiled(tuner, batch):
    """{"kept", "head", "back"} of a train step, bytes beyond what lay there."""
    import torch

    loss = tuner.compute_loss

    def marked(*args, **more):
        with torch.profiler.record_function("the head"):
            return loss(*args, **more)

    tuner.compute_loss = marked
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        tuner.train_on_batch(*batch)
    events = profile.profiler.kineto_results.events()
    (head,) = [e for e in events if e.name() == "the head"]
    moved = sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    )
    now, series = 0, []
    for when, size in moved:
        now += size
        series.append((when, now))
    end = [size for when, size in series if when < head.end_ns()][-1]
    inside = [
        size for when, size in series if head.start_ns() <= when < head.end_ns()
    ]
    after = [size for when, size in series if when >= head.end_ns()]
    # What the head leaves, the gradient of its input, counts as kept.
    return {
        "kept": end,
        "head": max(inside) - end,
        "back": max(after) - end,
    }


if __name__ == "__main__":
    main()
