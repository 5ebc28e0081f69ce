"""The benchmark of a GPU on this CPU: all of it but CUDA itself, short."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_gemma_ft import config
from tests.benchmarks.gpu import __main__ as command
from tests.benchmarks.gpu import (
    check,
    curves,
    launches,
    plan,
    report,
    table,
)
from tests.benchmarks.processes import ROOT

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of both backends by itself"
)


def measured(*flags):
    """The lines on stdout and the JSON of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", "--device=cpu",
         "--quick", *flags],
        cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return lines, json.loads(lines[-1])


def test_the_table():
    lines, found = measured(
        "--rows=4x1024", "--contenders=ours-torch,peft,peft-liger",
        "--repeats=3", "--budget=55",
    )  # fmt: skip
    results = {(r["row"], r["contender"]): r for r in found["results"]}
    ours, peft = results["4x1024", "ours-torch"], results["4x1024", "peft"]
    for result in (ours, peft):
        assert result["steps"] == 3 and result["finite"]
        assert result["tokens_per_s"] == pytest.approx(
            4 * 64 / result["step_ms"] * 1000, rel=1e-3
        )
        assert result["peak_gib"] > 0.1 and result["first_step_s"] > 0
        assert len(result["losses"]) == 5
        # Random logits of a deviation of up to 1.
        assert 0 < result["losses"][0] - np.log(4096) < 0.7
    ratio = found["ratios"]["4x1024"]["ours-torch/peft"]["speed"]
    speeds = ours["tokens_per_s"] / peft["tokens_per_s"]
    assert ratio == pytest.approx(speeds, rel=1e-2)
    liger = results["4x1024", "peft-liger"]
    assert "step_ms" not in liger and liger["left_out"]
    assert ours["attention"] == "Tiles" and peft["attention"] is None
    assert found["card"]["name"] == "cpu" and found["versions"]["torch"]
    assert "--repeats=3" in found["command"]
    table_lines = [line for line in lines if line.startswith("|")]
    assert len(table_lines) == 2 + len(results)
    assert f"{ours['tokens_per_s']:,.0f}" in table_lines[2]
    assert "left out: " in "".join(table_lines)


def arguments(*flags):
    return command.read(["--quick", *flags])


CARD = {"gpu": False, "memory": 2**34, "flops": 1e12, "dtype": "float32"}


class Failing:
    """A worker whose card is full while others are on it."""

    crowd = 0

    def __init__(self, name, spec, *, limit, deadline):
        self.name, self.error, self.built = name, None, {}

    def build(self):
        pass

    def attempt(self, what):
        if what == "step" and self.crowd > 1:
            self.error = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
        if self.error or what == "reset":
            return None
        if what == "memory":
            return {"peak": 2**30, "whole_peak": 2**31, "where": "device"}
        return {"seconds": 0.5, "loss": 1.0}

    def close(self):
        Failing.crowd -= 1


def test_who_finds_no_memory_gets_a_turn_alone(monkeypatch):
    def start(*args, **settings):
        Failing.crowd += 1
        return Failing(*args, **settings)

    monkeypatch.setattr(table, "Worker", start)
    args = arguments("--rows=4x1024", "--contenders=ours-torch,peft")
    found = table.fill(args, CARD)
    assert [entry["step_ms"] for entry in found] == [500, 500]
    assert all(entry["alone"] for entry in found)
    # Alone too there may be none.
    monkeypatch.setattr(Failing, "crowd", 5)
    found = table.fill(args, CARD)
    assert [entry["error"] for entry in found] == ["out of memory"] * 2
    assert "| out of memory |" in report.markdown(found)
    assert not report.ratios(found)


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(table, "measure", lambda *x: pytest.fail("started"))
    monkeypatch.setattr(plan, "missing", lambda name, on_gpu: None)
    args = arguments("--rows=9b", "--budget=0")
    small = {**CARD, "gpu": True}
    args.quick = False
    found = table.fill(args, small)
    assert {entry["left_out"] for entry in found} == {
        "takes about 25 GiB", "takes about 45 GiB"
    }  # fmt: skip
    found = table.fill(args, {**small, "memory": 2**37})
    assert {"the budget is used up (--budget)"} == {
        entry["left_out"] for entry in found
    }


def test_who_is_on_the_card_together(monkeypatch):
    args = arguments("--together=3")
    args.quick = False
    card = {**CARD, "gpu": True, "memory": 40 * 2**30}
    waiting = [
        {"row": "4x1024", "contender": name, "expected_gib": gib}
        for name, gib in (("a", 19), ("b", 14), ("c", 8), ("d", 1))
    ]
    assert len(table._together(args, card, waiting)) == 2
    assert len(table._together(args, card, waiting[1:])) == 3
    large = {**waiting[0], "expected_gib": 99}
    assert len(table._together(args, card, [large])) == 1


def test_every_row_and_contender_is_planned():
    rows, names = {r for r, _, _ in plan.ORDER}, {c for _, c, _ in plan.ORDER}
    assert rows == set(plan.ROWS) and names == set(plan.CONTENDERS)
    assert len({(r, c) for r, c, _ in plan.ORDER}) == len(plan.ORDER)
    assert all(plan.who(name) for name in names)
    with pytest.raises(SystemExit):
        arguments("--rows=4x1025")


@pytest.mark.parametrize("name,tflops", [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("Tesla T4", 65),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121),
    ("NVIDIA GeForce 9999", 0),
])  # fmt: skip
def test_the_share_is_of_the_cards_own_peak(name, tflops):
    assert report.peak(name) == tflops * 1e12


def test_the_line_is_json_whatever_happened():
    text = report.line(a={"b": [float("nan"), 1.5]}, c=float("inf"))
    assert json.loads(text) == {"a": {"b": ["nan", 1.5]}, "c": "inf"}


def test_launches_of_a_compiled_block_are_at_most_a_third():
    spec = {"shape": (1, 64), "dtype": "bfloat16", "real": False}
    cfg = config.replace(config.Config(), {"lora.style": "standard"})
    plain = launches.per_block(spec, cfg, "off", launches.dispatched)
    fused = launches.per_block(spec, cfg, "on", launches.scheduled)
    # 7 kernels and 14 adapter matrices, both ways, attention's products.
    assert plain > 200 and fused > 60
    assert fused <= plain * launches.SHARE


def test_what_counts_as_a_launch():
    import torch

    def three():
        x = torch.ones(4, 6)
        y = x.view(6, 4).t()[1:].unsqueeze(0)
        return (y.expand(2, -1, -1) * 2).reshape(-1)

    # ones, the product and, of what is not contiguous, the copy.
    assert launches.dispatched(three) == 3


def test_curves_are_told_apart(monkeypatch):
    from keras_gemma_ft.model import compiled, torch_attention
    from keras_gemma_ft.tuning import chunks
    from tests.benchmarks.gpu import random_model

    spec = {"backend": "torch", "gpu": False, "quick": True}
    case = {"dtype": "float32", "compile": "on"}
    monkeypatch.setattr(curves, "STEPS", 6)
    monkeypatch.setattr(compiled, "inductor", compiled.inductor)
    monkeypatch.setattr(chunks, "_compiled", chunks._compiled)
    random_model.trace()
    want = curves.curve(spec, {**case, "compile": "off"})
    got = curves.curve(spec, case)
    (result,) = check._pair("torch, float32", got, want)
    assert result["ok"] and result["loss"] < 1e-6
    assert result["attention"] == ["Tiles", "NoneType"]
    # Attention that leaves the soft cap out is seen.
    choose = torch_attention.choose
    monkeypatch.setattr(
        torch_attention, "choose", lambda b, dtype, cap: choose(b, dtype, None)
    )
    wrong = curves.curve(spec, case)
    (result,) = check._pair("torch, float32", wrong, want)
    assert result["ok"] is False
    failed = {"error": "OutOfMemoryError: of all"}
    (result,) = check._pair("torch, float32", failed, want)
    assert "OutOfMemoryError" in check.markdown([result])
