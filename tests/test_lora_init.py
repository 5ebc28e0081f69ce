"""PiSSA and LoftQ: against NumPy's exact SVD, and exported to the old base.

Witnesses: `np.linalg.svd` in float64 of kernels written out by einsum; the
model before anything was replaced; PEFT over transformers; stock KerasHub.
"""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops
from test_lora import logits
from test_run import settings, stock_loss, workshop  # noqa: F401

from keras_gemma_ft import command_line, config, evaluate, runtime
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.formats import adapters
from keras_gemma_ft.model import hosts, lora, lora_init, presets, quantize
from keras_gemma_ft.tuning import fine_tuner, trainer

BACKEND = keras.config.backend()
STYLES = pytest.mark.parametrize("style", ["keras", "standard"])
# What A B looks like beside a kernel, and the matrix whose SVD is the best.
HEADED = {"keras": ("ndr,rh->ndh", "ndh->(nd)(h)"),
          "standard": ("dr,rnh->ndh", "ndh->(d)(nh)")}  # fmt: skip
OTHERS = {
    "attention_output": ("nhr,rd->nhd", "nhd->(nh)(d)"),
    "ffw_gating": ("dr,rf->df", "df->(d)(f)"),
}
SHAPES = {
    "query": (4, 40, 16),
    "attention_output": (4, 16, 40),
    "ffw_gating": (40, 64),
}


def cases(style):
    heads = dict.fromkeys(["query"], HEADED[style])
    return {**heads, **OTHERS}.items()


def flat(kernel, way):
    """A kernel as the matrix that "ndh->(d)(nh)" tells."""
    before, _, after = way.partition("->")
    rows, columns = after[1:-1].split(")(")
    turned = np.einsum(f"{before}->{rows}{columns}", kernel)
    sizes = dict(zip(before, kernel.shape))
    return turned.reshape(int(np.prod([sizes[x] for x in rows])), -1)


def best(kernel, way, rank):
    """(the best approximation as a matrix, squared norm of what is left)."""
    u, s, v = np.linalg.svd(flat(kernel, way), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], np.sum(s[rank:] ** 2)


def kernel_of(target, seed=0):
    """A kernel with a spectrum that falls, as trained ones have."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 0.02, SHAPES[target])
    for _ in range(6):
        parts = [rng.normal(size=n) for n in SHAPES[target]]
        letters = "abc"[: len(parts)]
        kernel += 0.03 * np.einsum(f"{','.join(letters)}->{letters}", *parts)
    return kernel


@STYLES
@pytest.mark.parametrize("more", [{}, {"alpha": 7.0, "rslora": True}])
def test_pissa_is_the_truncated_svd(style, more):
    settings = config.Lora(rank=3, style=style, init="pissa", **more)
    scale = 7.0 / 3**0.5 if more else 1.0
    for target, (pair, way) in cases(style):
        w = kernel_of(target)
        a, b, rest = lora_init.init(w, target, settings, "none", seed=1)
        product = np.einsum(pair, *map(np.float64, (a, b)))
        want, left = best(w, way, 3)
        tiny.close(target, scale * flat(product, way), want, atol=2e-4)
        tiny.close("rest", rest + scale * product, w, atol=2e-6)
        np.testing.assert_allclose(np.sum(rest**2), left, rtol=1e-4)
        # Neither A nor B carries all of the size.
        norms = [np.linalg.norm(part) for part in (a, b)]
        np.testing.assert_allclose(*norms, rtol=1e-3)


def test_noise_of_2b_shape_is_nearly_the_truncated_svd():
    """The hardest case: singular values that hardly fall."""
    w = np.random.default_rng(0).standard_normal((288, 1152), "float32")
    a, b = lora_init.principal(w, 8, 0)
    s = np.linalg.svd(w.astype("float64"), compute_uv=False)
    share = (np.sum(w**2) - np.sum((w - a @ b) ** 2)) / np.sum(s[:8] ** 2)
    assert 0.995 < share < 1 + 1e-5
    tall = lora_init.principal(np.ascontiguousarray(w.T), 8, 0)
    np.testing.assert_allclose(tall[0] @ tall[1], (a @ b).T, atol=1e-4)


def test_a_rank_above_the_matrixs_is_filled_with_zeros():
    w = np.random.default_rng(0).standard_normal((5, 16), "float32")
    a, b = lora_init.principal(w, 8, 0)
    assert (a.shape, b.shape) == ((5, 8), (8, 16))
    np.testing.assert_allclose(a @ b, w, atol=1e-5)
    assert not np.any(a[:, 5:]) and not np.any(b[5:])


@STYLES
@pytest.mark.parametrize("mode", ["nf4", "int4", "int8"])
def test_loftq_fits_the_error_of_the_base(style, mode):
    settings = config.Lora(rank=4, style=style, init="loftq", alpha=2.0)
    for target, (pair, way) in cases(style):
        w = kernel_of(target)
        a, b, rest = lora_init.init(w, target, settings, mode, seed=1)
        np.testing.assert_array_equal(rest, w.astype("float32"))
        stored = quantize.encode(w, mode)
        q = ops.convert_to_numpy(quantize.decode(stored, mode, "float32"))
        error = w - q
        left = error - 0.5 * np.einsum(pair, *map(np.float64, (a, b)))
        _, least = best(error, way, 4)
        assert least <= np.sum(left**2) * (1 + 1e-6) < 1.002 * least
        assert np.sum(left**2) < 0.85 * np.sum(error**2)


# --- a model -----------------------------------------------------------------


def started(folder, mode="none", *, kept=None, **settings):
    """A backbone as `trainer.build` starts it."""
    backbone = presets.load(str(folder)).causal_lm.backbone
    lora.enable(backbone, config.Lora(**{"rank": 3, **settings}), seed=5)
    lora_init.apply(backbone, mode, seed=5, kept=kept)
    if mode != "none":
        quantize.apply(backbone, lora.layers(backbone), mode)
    return backbone


def train(backbone, seed=0, size=0.03):
    """Moves A and B a little, as training does."""
    rng = np.random.default_rng(seed)
    for pair in lora.variables(backbone).values():
        for v in pair:
            v.assign_add(rng.normal(0, size, v.shape).astype("float32"))


def test_pissa_loads_on_the_original_base(folder, tmp_path):
    """In PEFT and here; in stock KerasHub after a run, below."""
    import peft

    style, more = "standard", {"alpha": 7.0, "rslora": True}
    token_ids = tiny.ids(2, tiny.T)
    plain = presets.load(str(folder)).causal_lm.backbone
    want = logits(plain, token_ids)
    ours = started(folder, init="pissa", style=style, **more)
    assert lora.scale(ours) == 7.0 / 3**0.5
    # The kernels themselves have changed, the model has not.
    pairs = zip(lora.layers(ours), lora.layers(plain))
    apart = [ops.convert_to_numpy(a._kernel - b._kernel) for a, b in pairs]
    assert min(np.abs(x).max() for x in apart) > 0.1
    tiny.close("at the start", logits(ours, token_ids), want, atol=2e-4)
    # Nothing was learned: the adapter is nothing, to the last bit.
    fresh = lora.read(ours)
    assert fresh.rank == 6 and fresh.init == "pissa"
    for key, (a, b) in fresh.weights.items():
        assert not np.any(adapters.product(style, key[1], a, b)), key
    train(ours)
    tuned_logits = logits(ours, token_ids)
    assert np.abs(tuned_logits - want).max() > 1
    adapters.write_peft(tmp_path / "adapter", lora.read(ours))
    again = presets.load(str(folder)).causal_lm.backbone
    lora.load(again, tmp_path / "adapter")
    got = logits(again, token_ids)
    tiny.close("ours", got, tuned_logits, atol=5e-4)
    base = tiny.witness(folder)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        got = theirs(torch.tensor(token_ids).long()).logits
    tiny.close("PEFT", got, tuned_logits, atol=5e-4)


def test_the_difference_survives_16_bits():
    """[A, A - A0] x [B - B0; B0] in bfloat16 keeps what [A, A0] x [B; -B0]
    loses."""
    import ml_dtypes

    settings = config.Lora(rank=4, init="pissa")
    w = kernel_of("ffw_gating")
    a0, b0, _ = lora_init.init(w, "ffw_gating", settings, "none", seed=0)
    rng = np.random.default_rng(1)
    a, b = (
        part + rng.normal(0, 1e-3, part.shape).astype("float32")
        for part in (a0, b0)
    )
    now = adapters.Adapter(
        "standard", 4, 4.0, False, 0.0, ("ffw_gating",),
        {(0, "ffw_gating"): (a, b)},
    )  # fmt: skip
    start = dataclasses.replace(now, weights={(0, "ffw_gating"): (a0, b0)})
    ((left, right),) = adapters.difference(now, start).weights.values()
    want = a.astype("float64") @ b - a0.astype("float64") @ b0

    def error(left, right):
        left, right = (
            part.astype(ml_dtypes.bfloat16).astype("float64")
            for part in (left, right)
        )
        return np.linalg.norm(left @ right - want) / np.linalg.norm(want)

    assert error(left, right) < 0.004
    plain = np.concatenate([a, a0], 1), np.concatenate([b, -b0], 0)
    assert error(*plain) > 20 * error(left, right)


def test_loftq_starts_nearer_to_the_float_model():
    """Loss by loss of the embedded model's own tokens: it is trained."""
    loaded = presets.load(config.EMBEDDED_PRESET)
    backbone = loaded.causal_lm.backbone
    tuner = fine_tuner.FineTuner(loaded.causal_lm)
    tuner.compile()
    cfg = config.Data(sequence_length=96)
    rows = pipeline.prepare(cfg, loaded.tokenizer, "eval", 0)
    batches = pipeline.train_batches(rows, batch_size=8, seed=0, steps=1)
    x, y, weight = next(iter(batches))
    table = ops.convert_to_numpy(backbone.token_embedding.embeddings.value)
    names = config.TARGETS * backbone.num_layers
    kernels = [
        (name, dense, ops.convert_to_numpy(dense._kernel.value))
        for name, dense in zip(names, lora.layers(backbone))
    ]

    def losses(start):
        for name, dense, w in kernels:
            rest, product = w, 0.0
            if start in ("loftq", "pissa"):
                settings = config.Lora(rank=32, init=start)
                a, b, rest = lora_init.init(w, name, settings, "nf4", seed=0)
                product = np.einsum("...r,rz->...z", a, b)
            if start != "float":
                stored = quantize.encode(rest, "nf4")
                rest = quantize.decode(stored, "nf4", "float32")
                rest = ops.convert_to_numpy(rest)
            # Into one float model: one program for all of them.
            dense._kernel.assign(rest + product)
        hidden = tuner.predict(x, batch_size=8, verbose=0)
        z = 30 * np.tanh(hidden.astype("float64") @ table.T / 30)
        right = np.take_along_axis(z, y[..., None], -1)[..., 0]
        return (np.log(np.sum(np.exp(z), -1)) - right)[weight > 0]

    exact, *others = map(losses, ("float", "plain", "loftq", "pissa"))
    plain, loftq, pissa = (np.mean((x - exact) ** 2) ** 0.5 for x in others)
    print(np.mean(exact), plain, loftq, pissa)
    assert loftq < 0.75 * plain
    # PiSSA quantises a kernel without its largest directions.
    assert pissa < 0.75 * plain


def test_the_pairs_are_kept_for_a_run_that_goes_on(
    folder, tmp_path, monkeypatch
):
    path = tmp_path / "start.safetensors"
    first = started(folder, init="pissa", kept=path)
    monkeypatch.setattr(lora_init, "principal", None)
    again = started(folder, init="pissa", kept=path)
    for one, two in zip(first.variables, again.variables):
        one, two = map(ops.convert_to_numpy, (one.value, two.value))
        np.testing.assert_array_equal(one, two)
    for key, pair in first.lora_start.weights.items():
        for one, two in zip(pair, again.lora_start.weights[key]):
            np.testing.assert_array_equal(one, two)


def test_every_process_starts_from_the_first_ones_pairs(
    folder, tmp_path, monkeypatch
):
    path = tmp_path / "start.safetensors"
    first = started(folder, init="pissa", kept=path, targets="value")
    sent = []
    monkeypatch.setattr(hosts, "many", lambda: True)
    monkeypatch.setattr(hosts, "first", lambda: True)
    monkeypatch.setattr(hosts, "whole", ops.convert_to_numpy)
    monkeypatch.setattr(
        hosts, "broadcast", lambda data: sent.append(data) or data
    )
    started(folder, init="pissa", targets="value")
    # Another process computes nothing and is told all.
    monkeypatch.setattr(hosts, "first", lambda: False)
    monkeypatch.setattr(hosts, "broadcast", lambda data: sent.pop(0))
    monkeypatch.setattr(lora_init, "principal", None)
    other = started(folder, init="pissa", targets="value")
    assert not sent
    for one, two in zip(first.variables, other.variables):
        one, two = map(ops.convert_to_numpy, (one.value, two.value))
        np.testing.assert_array_equal(one, two)


# --- a run -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pissa", "loftq"])
def run(request, workshop, tmp_path_factory):  # noqa: F811
    """(settings, summary) of a run; PiSSA's was stopped and went on."""
    init = request.param
    cfg = settings(
        workshop,
        tmp_path_factory.mktemp(init),
        lora__init=init,
        model__quantize={"pissa": "none", "loftq": "nf4"}[init],
        train__eval_every="8",
    )
    if init == "pissa":
        stop = config.replace(cfg, {"train.time_budget": "0.001s"})
        with pytest.raises(runtime.Stopped):
            trainer.run(stop, BACKEND)
    with pytest.MonkeyPatch.context() as patch:
        if init == "pissa":
            patch.setattr(lora_init, "principal", None)
        return cfg, trainer.run(cfg, BACKEND)


def test_evaluate_repeats_the_score_on_the_original_base(
    run,
    workshop,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    cfg, summary = run
    plain = {"lora.init": "default", "model.quantize": "none"}
    found = evaluate.evaluate(
        config.replace(cfg, {**plain, "adapter": cfg.run_dir})
    )
    got, base = found["adapter"]["eval_loss"], found["base"]["eval_loss"]
    # Quantised, the run's scores carry what is left of the base's error.
    rtol = {"none": 1e-5, "nf4": 0.03}[cfg.model.quantize]
    np.testing.assert_allclose(got, summary["eval_loss"], rtol=rtol)
    np.testing.assert_allclose(base, summary["eval_loss_before"], rtol=rtol)
    assert got < base - 0.05
    folder = pathlib.Path(cfg.run_dir)
    pairs = config.Lora(rank=2 * cfg.lora.rank)
    want = stock_loss(
        workshop / "preset",
        workshop / "eval.jsonl",
        (folder / "adapter.lora.h5", pairs),
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_card_says_what_the_adapter_is_for(run):
    cfg, _ = run
    folder = pathlib.Path(cfg.run_dir) / "adapter"
    card = (folder / "README.md").read_text()
    name = {"pissa": "PiSSA (arXiv 2404", "loftq": "LoftQ (arXiv 2310"}
    assert f"Training started from {name[cfg.lora.init]}" in card
    assert "the original base weights" in card
    assert "| trained as | rank 2, alpha 3, style keras |" in card
    assert "of twice the rank, 4." in card
    config_file = json.loads((folder / "adapter_config.json").read_text())
    # PEFT changes the base for "pissa": this adapter must not ask it to.
    assert config_file["init_lora_weights"] is True
    assert adapters.read_peft(folder).init == cfg.lora.init


@pytest.mark.once
@pytest.mark.parametrize(
    "changes,cure",
    [
        ({"lora.init": "loftq"}, "Add --model.quantize=nf4"),
        ({"lora.init": "pissa", "lora.rank": 0}, "use --lora.rank=8"),
        ({"lora.init": "pissa", "lora.dropout": 0.1}, "--lora.dropout=0"),
    ],
)
def test_what_cannot_be_started_is_refused(changes, cure):
    with pytest.raises(config.UserError, match=f"--lora.init=.*{cure}"):
        command_line.check(config.replace(config.Config(), changes))
