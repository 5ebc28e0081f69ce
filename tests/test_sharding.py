"""Layouts that divide, and the same losses on any mesh of virtual devices."""

import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tiny

from keras_gemma_ft import config
from keras_gemma_ft.formats import names
from keras_gemma_ft.model import forward, layouts, lora, presets, sharding

MESHES = pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4), (4, 2)])
# (layers, hidden, heads, key/value heads, head_dim, feed-forward) of Gemma 2,
# and its parameters.
SIZES = {
    "2b": ((26, 2304, 8, 4, 256, 9216), 2_614_341_888),
    "9b": ((42, 3584, 16, 8, 256, 14336), 9_241_705_984),
    "27b": ((46, 4608, 32, 16, 128, 36864), 27_227_128_320),
}
MODELS = pytest.mark.parametrize("model", SIZES)


def _weights(model):
    """(path, shape, 2 bytes) of every weight of a Gemma 2 in bfloat16."""
    layers, hidden, heads, kv_heads, head_dim, ffw = SIZES[model][0]
    shapes = names.variable_shapes(
        {
            "vocabulary_size": 256000,
            "num_layers": layers,
            "hidden_dim": hidden,
            "num_query_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_dim": 2 * ffw,
        }
    )
    return [(f"gemma_backbone/{p}", s, 2) for p, s in shapes.items()]


@MESHES
@MODELS
def test_every_large_weight_is_split_over_all_devices(model, mesh):
    size = dict(batch=mesh[0], model=mesh[1])
    for path, shape, width in _weights(model):
        axes = layouts.layout(path, shape, mesh)
        parts = [size[a] if a else 1 for a in axes]
        assert all(n % p == 0 for n, p in zip(shape, parts)), path
        if width * np.prod(shape) > 2**20:
            assert np.prod(parts) == 8, path


@MESHES
@MODELS
def test_bytes_of_a_device(model, mesh):
    items = _weights(model)
    whole = layouts.bytes_per_device(items, (1, 1))
    assert sum(whole.values()) == 2 * SIZES[model][1]
    held = layouts.bytes_per_device(items, mesh)
    for kind in ("embedding", "attention", "feed-forward"):
        assert held[kind] == whole[kind] / 8 > 0
    assert held["norms"] == whole["norms"] > 0 == held["adapters"]


def test_bytes_of_other_kinds():
    items = [
        ("decoder_block_3/attention/key/lora_kernel_a", (4, 64, 8), 4),
        ("decoder_block_3/attention/key/codes", (4, 64, 32), 1),
        ("decoder_block_3/ffw_linear/absmax", (64, 8), 1),
        ("token_embedding/codes", (352, 64), 1),
        ("token_embedding/step", (352, 1), 4),
        ("dropout/state", (2,), 4),
    ]
    assert layouts.bytes_per_device(items, (8, 1)) == {
        "adapters": 4 * 64 * 8 * 4,
        "embedding": 352 * 64 / 8 + 4 * 352 / 8,
        "norms": 0,
        "attention": 4 * 64 * 32 / 8,
        "feed-forward": 64 * 8 / 8,
        "others": 8,
    }


@pytest.mark.parametrize(
    "weights,memory,want",
    [
        (2**30, None, True),
        (2**30 + 1, None, False),
        (4 * 2**30, 32 * 2**30, True),
        (4 * 2**30 + 1, 32 * 2**30, False),
        (None, 32 * 2**30, False),
    ],
)
def test_small_models_stay_whole(weights, memory, want):
    assert sharding.stay_whole(weights, memory)[0] is want


@pytest.mark.parametrize(
    "path", ["decoder_block_0/attention/query/lora_kernel_a", "norm/scale"]
)
def test_small_variables_stay_whole(path):
    assert layouts.layout(path, (8, 2304, 16), (2, 4)) == [None] * 3


def test_what_does_not_divide_is_whole_and_never_an_error():
    axes = layouts.layout("x/ffw_gating/kernel", (30, 50), (4, 2))
    assert axes == [None, "model"]


def _config(mesh, rows=8):
    return config.Config(mesh=mesh, data=config.Data(batch_size=rows))


@pytest.mark.parametrize(
    "mesh,rows,message",
    [
        ("8", 8, "BATCHxMODEL"),
        ("4x4", 8, "needs 16 devices"),
        ("8x1", 6, "--data.batch_size=8"),
    ],
)
def test_meshes_that_cannot_be(mesh, rows, message):
    with pytest.raises(config.UserError, match=message):
        sharding.mesh_shape(_config(mesh, rows), 8)


def test_auto_splits_rows_where_they_divide():
    assert sharding.mesh_shape(_config("auto", 16), 8)[0] == (8, 1)
    assert sharding.mesh_shape(_config("auto", 6), 8)[0] == (1, 8)
    assert sharding.mesh_shape(_config("auto"), 1)[0] == (1, 1)


# --- runs on 8 virtual devices ------------------------------------------------

WORDS = "the quick brown fox jumps over lazy dog question answer two is".split()
# 13 rows in batches of 8, 5 held-out rows, 3 prompts: nothing divides.
BASE = {
    "data.sequence_length": 48,
    "data.pack": False,
    "data.buckets": 1,
    "lora.rank": 3,
    "train.steps": 10,
    "train.log_every": "1",
    "train.eval_every": "0",
    "train.learning_rate": 3e-3,
    "train.exact_match": 0,
}
FULL = {"train.samples": 3}
TRAINED = {"train.samples": 0, "data.eval": "none"}
RUNS = {
    f"{style} {mesh}": {"lora.style": style, **more}
    for style, more in (("keras", FULL), ("standard", TRAINED))
    for mesh in ("none", "8x1", "1x8", "2x4")
}
RUNS["keras auto"] = TRAINED
STORED = {"model.quantize": "nf4", "model.quantize_embedding": "int8"}
RUNS |= {f"nf4 {m}": TRAINED | STORED for m in ("none", "8x1", "2x4")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the model and of each of RUNS."""
    if keras.config.backend() != "jax":
        pytest.skip("keras.distribution is JAX only")
    root = tmp_path_factory.mktemp("runs")
    # 2B's heads; words that 8 devices can share.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    tiny.save(root / "model", vocab_size=352, num_hidden_layers=2, **heads)
    rng = np.random.default_rng(0)
    files = {"preset": str(root / "model")}
    for split, rows in (("train", 13), ("eval", 5)):
        lines = [
            json.dumps(
                {
                    "prompt": " ".join(rng.choice(WORDS, 4)),
                    "response": " ".join(rng.choice(WORDS, 3)),
                }
            )
            for _ in range(rows)
        ]
        (root / f"{split}.jsonl").write_text("\n".join(lines))
        files[f"data.{split}"] = str(root / f"{split}.jsonl")
    runs = [
        {
            **files, **BASE, **more, "run_dir": str(root / name),
            "mesh": name.split()[1],
        }
        for name, more in RUNS.items()
    ]  # fmt: skip
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    flags += f" --xla_dump_to={root}/programs --xla_dump_hlo_as_text"
    flags += " --xla_dump_hlo_module_re=.*train_step.*"
    script = pathlib.Path(__file__).with_name("meshes.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(runs)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (root / "stderr").write_text(done.stderr)
    return root


def _read(folder, name):
    text = (folder / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _losses(folder):
    return [line["loss"] for line in _read(folder, "metrics.jsonl")]


@pytest.mark.parametrize(
    "name", [name for name in RUNS if not name.endswith("none")]
)
def test_meshes_give_the_losses_of_one_device(runs, name):
    want = _losses(runs / f"{name.split()[0]} none")
    assert len(want) == 10 and want[-1] < want[0] - 0.5
    got = _losses(runs / name)
    tiny.close(name, got, want, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["8x1", "1x8", "2x4"])
def test_meshes_evaluate_and_generate_as_one_device(runs, mesh):
    one, many = (runs / f"keras {m}" for m in ("none", mesh))
    for key in ("eval_loss_before", "eval_loss"):
        want, got = (
            json.loads((run / "summary.json").read_text())[key]
            for run in (one, many)
        )
        tiny.close(key, got, want, rtol=1e-5)
    got, want = (_read(run, "samples.jsonl") for run in (many, one))
    assert len(got) == 3 and got == want
    assert any(sample["before"] != sample["after"] for sample in want)


def test_a_small_model_stays_whole_where_the_mesh_is_ours_to_choose(runs):
    said = (runs / "stderr").read_text()
    assert "8 rows divide over 8 devices; weights whole on each" in said
    sizes = re.findall(r"weights: (.*) MiB a device of 8 \((.*?)\)", said)
    told = {way: float(size) for size, way in sizes}
    whole = told.pop("data parallel 8x1")
    assert set(told) == {
        "FSDP 8x1",
        "tensor parallel 1x8",
        "FSDP and tensor parallel 2x4",
    }
    assert max(told.values()) < whole / 5
    # In the order of the runs: one program of a train step each.
    found = sorted((runs / "programs").glob("*after_optimizations.txt"))
    assert len(found) == len(RUNS)
    moved = {
        name: re.findall(r" (all-\w+)(?:-start)?\(", path.read_text())
        for name, path in zip(RUNS, found)
    }
    assert moved["keras none"] == []
    # The gradients' sum, and a flag of each block's rows: no weight.
    assert moved["keras auto"] == ["all-reduce"] * 2
    assert moved["keras 8x1"].count("all-gather") >= 14


@pytest.mark.parametrize("style", ["keras", "standard"])
def test_an_adapter_of_a_mesh_is_read_on_one_device(runs, style):
    import peft
    import torch

    loaded = presets.load(str(runs / "model"))
    adapter = lora.load(
        loaded.causal_lm.backbone, runs / f"{style} 8x1" / "adapter"
    )
    other = presets.load(str(runs / "model"))
    alone = lora.load(
        other.causal_lm.backbone, runs / f"{style} none" / "adapter"
    )
    for key, pair in adapter.weights.items():
        for got, want in zip(pair, alone.weights[key]):
            np.testing.assert_allclose(got, want, atol=1e-4)
    ids = tiny.ids(2, tiny.T)
    layout = [np.tile(a, (2, 1)) for a in tiny.layout(tiny.T)]

    def logits(*batch):
        backbone = loaded.causal_lm.backbone
        hidden = forward.hidden_states(backbone, *batch)
        return forward.logits(backbone, hidden)

    base = tiny.witness(runs / "model")
    with torch.no_grad():
        plain = base(torch.tensor(ids).long()).logits
        theirs = peft.PeftModel.from_pretrained(
            base, runs / f"{style} 8x1" / "adapter"
        )
        want = theirs(torch.tensor(ids).long()).logits
    assert (want - plain).abs().max() > 0.1
    tiny.close("PEFT", tiny.compute(logits, ids, *layout), want, atol=1e-4)
