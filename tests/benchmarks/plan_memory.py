"""The planner's estimate against what steps really take on this machine.

    python -m tests.benchmarks.plan_memory --backend=jax,torch
    python -m tests.benchmarks.plan_memory --mesh=8x1

Some steps of a random-weight Gemma 2, each in a process of its own. What a step
adds to the process (peak resident memory, without compiling, over what lay
there before) stands against the estimate without weights, adapters and
optimizer; on JAX the compiler's own number, too. Prints a table to stderr, and
one line of JSON: for each case measured, estimated and compiled bytes, and the
estimate's error as a share of the whole (weights included).

With --mesh: the bytes that `plan --device=cpu --compile` tells of virtual
devices, against what the same step adds to a process that has them: weights,
optimizer and all, over what it took before any of it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

from keras_gemma_ft import config
from keras_gemma_ft.planning import arithmetic, devices
from tests.benchmarks import contenders, model
from tests.benchmarks.processes import ROOT, Worker, say, table, tidy

# layers, hidden, heads, kv_heads, head_dim, ffw, words
MODELS = {
    "small": model.SMALL,
    "wide": (4, 1024, 8, 4, 128, 4096, 65536),
}
# model, rows, tokens, remat
CASES = [
    ("small", 4, 256, "none"),
    ("small", 8, 512, "block"),
    ("small", 8, 512, "none"),
    ("wide", 2, 2048, "block"),
    ("wide", 2, 1024, "none"),
]
_LYING = ("weights", "adapters", "optimizer")


def main():
    """Measures; prints the table and the line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.plan_memory")
    model.add_flags(parser, model.SMALL)
    parser.add_argument("--cases", default="0,1,2,3,4")
    parser.add_argument("--mesh", default="", help="BATCHxMODEL; JAX")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--child", default="", help="internal: plan or run")
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"plan": _plan, "run": _run}[args.child](args)))
        return
    tidy()
    # What is freed goes back at once: with the settings of our commands
    # (`runtime.allocator`) the heap keeps up to four times what a step needs.
    os.environ["GLIBC_TUNABLES"] = (
        "glibc.malloc.mmap_threshold=65536:glibc.malloc.arena_max=1"
    )
    if args.mesh:
        print(json.dumps(on_mesh(args)))
        return
    rows, found = [], {}
    for backend in args.backend.split(","):
        for case in (CASES[int(i)] for i in args.cases.split(",")):
            name = " ".join(map(str, (backend, *case)))
            found[name] = one = measured(args, backend, *case)
            mib = [f"{one[key] / 2**20:.0f}" for key in
                   ("measured", "estimated", "compiled", "lying")]  # fmt: skip
            rows.append([name, *mib, f"{one['error']:+.0%}"])
            say(f"{rows[-1]}")
    head = ["", "measured MiB", "estimated", "compiled", "weights", "error"]
    table(head, rows)
    print(json.dumps(found))


def measured(args, backend, which, rows, tokens, remat):
    """One case: its numbers."""
    sizes = model.Sizes(*MODELS[which])
    with tempfile.TemporaryDirectory() as folder:
        model.write(folder, sizes, dtype=args.dtype, seed=args.seed)
        spec = vars(args) | {
            "module": "contenders", "kind": "ours", "backend": backend,
            "folder": folder, "sizes": vars(sizes), "rows": rows,
            "tokens": tokens, "total": 4, "burst": 1, "learning_rate": 1e-3,
            "style": "keras", "adapter": "", "remat": remat,
        }  # fmt: skip
        worker = Worker(which, spec)
        try:
            worker.build()
            compiled = {}
            if backend == "jax":
                compiled = worker.ask("compiled")
            worker.ask("step")
            worker.ask("reset")
            for _ in range(3):
                worker.ask("step")
            memory = worker.ask("memory")
        finally:
            worker.close()
        cfg = config.replace(
            contenders.settings(spec), {"lora.targets": args.targets}
        )
    estimate = arithmetic.estimate(
        cfg, sizes.backbone(), devices.cpu(), (1, 1), dtype=args.dtype,
        recompute=remat == "block",
    )  # fmt: skip
    lying = sum(estimate.bytes[kind] for kind in _LYING)
    over = memory["peak"] - worker.built["now"]
    return {
        "measured": over,
        "estimated": estimate.total - lying,
        "compiled": compiled.get("compiled_bytes", lying) - lying,
        "lying": lying,
        "error": (estimate.total - lying - over) / (over + lying),
        "bytes": estimate.bytes,
    }


# --- virtual devices -----------------------------------------------------------


def on_mesh(args):
    """{"planned", "measured", "ratio"}: bytes of all devices together."""
    count = math.prod(config.mesh(args.mesh))
    found = {}
    for child in ("plan", "run"):
        command = [sys.executable, "-m", "tests.benchmarks.plan_memory"]
        command += [*sys.argv[1:], f"--child={child}"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT,
            env={
                **os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
            },
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found |= json.loads(done.stdout.splitlines()[-1])
    ratio = found["planned"] * count / found["measured"]
    return found | {"devices": count, "ratio": round(ratio, 3)}


def _settings(args):
    cfg = contenders.settings(
        vars(args)
        | {"backend": "jax", "folder": "", "total": 4, "remat": "block",
           "learning_rate": 1e-3, "style": "keras"}
    )  # fmt: skip
    return config.replace(cfg, {"mesh": args.mesh})


def _plan(args):
    """The compiler's bytes of a device, from a model without values."""
    cfg = _settings(args)
    from keras_gemma_ft.planning import program

    mesh = config.mesh(args.mesh)
    compiled = program.compile(
        cfg, model.Sizes.of(args).backbone(), devices.cpu(math.prod(mesh)), mesh,
        dtype=args.dtype,
    )  # fmt: skip
    return {"planned": compiled.total}


def _run(args):
    """What steps of the same model with values add to this process."""
    cfg = _settings(args)
    import keras
    import keras_hub
    import numpy as np

    from keras_gemma_ft.model import sharding
    from keras_gemma_ft.planning import program
    from keras_gemma_ft.tuning import trainer
    from tests.benchmarks import memory

    sharding.start(cfg)
    # The runtime itself, before anything of the model.
    keras.ops.ones((8, 8)) @ keras.ops.ones((8, 8))
    before = memory.read(None)["now"]
    with keras.device("cpu"):
        backbone = keras_hub.models.GemmaBackbone(
            **model.Sizes.of(args).backbone(), dtype=args.dtype
        )
    loaded = argparse.Namespace(
        causal_lm=keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    )
    tuner = trainer.build(cfg, loaded, steps=4, warmup=1)
    batch = program.batch(lambda kind: np.ones((args.rows, args.tokens), kind))
    tuner.train_on_batch(*batch)
    memory.reset(None)
    for _ in range(3):
        tuner.train_on_batch(*batch)
    return {"measured": memory.read(None)["peak"] - before}


if __name__ == "__main__":
    main()
