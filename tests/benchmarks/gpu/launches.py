"""Kernel launches of one decoder block, forward and backward.

On a GPU what torch.profiler sees run on the device: kernels, copies, fills. On
a CPU, op by op: the operations that PyTorch dispatches, those aside that only
change a view or reserve memory; compiled: what Inductor's scheduler holds
after fusion, each of which becomes a kernel or a call of a library.
FlexAttention does not run there: attention is the products and the softmax of
one block of queries.

A block is the difference between a model of four and of two, over two; graphs
are of blocks alone.
"""

import contextlib
import functools

from keras_gemma_ft import config, runtime
from tests.benchmarks import model
from tests.benchmarks.processes import Worker, say

# Of today's launches, what the compiled block may have.
SHARE = 1 / 3


def count(args, card):
    """[{"what", "op_by_op", "compiled", "ratio", "ok", ...}]."""
    found = []
    for mode in ("none", "nf4"):
        shape = (1, 256) if args.quick or not card["gpu"] else (4, 1024)
        spec = {
            "module": "gpu.launches", "kind": "serve", "backend": "torch",
            "shape": shape, "quantize": mode, "gpu": card["gpu"],
            "dtype": card["dtype"] if card["gpu"] else "bfloat16",
            "real": card["gpu"] and not args.quick,
        }  # fmt: skip
        worker = Worker(f"launches {mode}", spec)
        what = f"{shape[0]} x {shape[1]}, {spec['dtype']}"
        entry = {"what": what if mode == "none" else f"{what}, {mode}"}
        say(f"launches of {entry['what']}")
        worker.build()
        worker.close()
        if worker.error:
            entry |= {"error": worker.error, "ok": False}
        else:
            entry |= worker.built
            entry["ratio"] = round(entry["compiled"] / entry["op_by_op"], 3)
            entry["ok"] = entry["ratio"] <= SHARE
        found.append(entry)
    return found


def markdown(entries):
    """The table, and whether the ratio is what it has to be."""
    lines = [
        "| one block, forward + backward | op by op | compiled | ratio | "
        "counted |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        if "error" in entry:
            lines.append(f"| {entry['what']} | {entry['error']} | | | |")
            continue
        verdict = "" if entry["ok"] else " (above a third)"
        lines.append(
            f"| {entry['what']} | {entry['op_by_op']} | {entry['compiled']} | "
            f"{entry['ratio']:.2f}{verdict} | {entry['by']} |"
        )
    return "\n".join(lines)


def serve(spec, channel):
    """The process of one count: answers `build` with it."""
    cfg = config.replace(
        config.Config(),
        {"backend": "torch", "lora.style": "standard",
         "model.quantize": spec["quantize"]},
    )  # fmt: skip
    runtime.start(cfg)
    counter = on_device if spec["gpu"] else dispatched
    graphs = on_device if spec["gpu"] else scheduled
    found = {
        "op_by_op": per_block(spec, cfg, "off", counter),
        "compiled": per_block(spec, cfg, "on", graphs),
        "by": "torch.profiler" if spec["gpu"] else "operations in the graphs",
    }
    channel.answer(**found)


def per_block(spec, cfg, compile, counter):
    """Launches of a block by `counter`."""
    if counter is scheduled:
        return counter(step(spec, cfg, compile, 1))
    four, two = (counter(step(spec, cfg, compile, layers)) for layers in (4, 2))
    return (four - two) / 2


def step(spec, cfg, compile, layers):
    """A function that goes forward and backward once, and forgets it."""
    import torch

    from keras_gemma_ft.model import forward, lora
    from keras_gemma_ft.tuning import trainer
    from tests.benchmarks.gpu import random_model

    # A window as long as the row: one kind of block.
    sizes = model.Sizes(layers, 64, 4, 2, 16, 128, 4096)
    if spec["real"]:
        sizes = model.Sizes(layers, *model.PRESETS["2b"][1:])
    cfg = config.replace(cfg, {"model.compile": compile})
    backbone = random_model.causal_lm(
        sizes, spec["dtype"], cfg.model.quantize
    ).backbone
    lora.enable(backbone, cfg.lora, seed=0)
    values = [v.value for pair in lora.variables(backbone).values()
              for v in pair]  # fmt: skip
    rows, tokens = spec["shape"]
    device = values[0].device
    ids = torch.tensor(model.rows(sizes.words, rows, tokens - 1), device=device)
    places = torch.arange(tokens, device=device, dtype=torch.int32)
    blocks = trainer.blocks(cfg, backbone)

    def run():
        hidden = forward.hidden_states(
            backbone, ids, torch.ones_like(ids), places.expand(rows, tokens),
            blocks=blocks,
        )  # fmt: skip
        torch.autograd.grad(hidden.float().square().sum(), values)

    return run


def on_device(run):
    """What runs on the GPU in one `run`, once all is compiled."""
    import torch
    from torch.autograd import DeviceType

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    seen = sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in profile.events()
    )
    if not seen:
        raise AssertionError("torch.profiler sees nothing of this GPU")
    return seen


def dispatched(run):
    """Operations that `run` dispatches and that compute something."""
    from torch.utils import _python_dispatch

    seen = 0

    class Counter(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal seen
            seen += computes(op)
            return op(*args, **(kwargs or {}))

    run()
    with Counter():
        run()
    return seen


def computes(op):
    """Whether an operation of ATen does more than look or reserve."""
    name = op._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty", "_unsafe_view")):
        return False
    marks = [argument.alias_info for argument in op._schema.arguments]
    return not any(mark and not mark.is_write for mark in marks)


class _Counted(Exception):
    """The scheduler's nodes are counted: no code is to be made of them."""


def scheduled(run):
    """Kernels and library calls in Inductor's graphs of all that `run` calls.

    A graph is compiled once and called for each block; calls are counted.
    """
    from keras_gemma_ft.model import compiled

    seen, before = [], compiled.inductor
    compiled.inductor = functools.partial(_compile, before, seen)
    try:
        run()
        seen.clear()
        run()
    finally:
        compiled.inductor = before
    return sum(seen)


def _compile(inductor, seen, graph, inputs):
    """The graph by Inductor up to its schedule; then run op by op."""
    import copy

    from torch._inductor import compile_fx

    def inner(part, examples, **settings):
        kept = copy.deepcopy(part)
        launches = _nodes(lambda: compile_fx.compile_fx_inner(
            part, examples, **settings
        ))  # fmt: skip

        def call(arguments):
            seen.append(launches)
            return kept(*arguments)

        call._boxed_call = True
        return call

    return inductor(graph, inputs, inner)


def _nodes(compile):
    """How many kernels and calls the scheduler is left with."""
    import torch
    from torch._inductor import scheduler

    count = 0

    def look(nodes):
        nonlocal count
        count = sum(
            not isinstance(node, scheduler.NopKernelSchedulerNode)
            for node in nodes
        )
        raise _Counted

    settings = torch._inductor.config
    with settings.patch(_post_fusion_custom_pass=look, fx_graph_cache=False):
        with contextlib.suppress(_Counted, torch._inductor.exc.InductorError):
            compile()
    if not count:
        raise AssertionError("Inductor's scheduler has not been reached")
    return count
