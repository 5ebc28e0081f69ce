"""LoRA: the factored product, who is trained, dropout, and other readers.

Witnesses: W + s A B written out in float64; PEFT over transformers; a plain
KerasHub script with `enable_lora` and `load_lora_weights`.
"""

import dataclasses

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.formats import adapters
from keras_gemma_ft.model import forward, kernels, lora, presets

BOTH = pytest.mark.parametrize("style", ["keras", "standard"])
# The stock equations of x W, and those of A B with the kernel's shape.
PRODUCTS = {
    "query": ("btd,ndh->btnh", "ndr,rh->ndh", "dr,rnh->ndh"),
    "attention_output": ("btnh,nhd->btd", "nhr,rd->nhd", "nhr,rd->nhd"),
    "ffw_gating": ("btd,df->btf", "dr,rf->df", "dr,rf->df"),
    "ffw_linear": ("btf,fd->btd", "fr,rd->fd", "fr,rd->fd"),
}
PRODUCTS |= {
    "key": PRODUCTS["query"],
    "value": PRODUCTS["query"],
    "ffw_gating_2": PRODUCTS["ffw_gating"],
}


def tuned(folder, **settings):
    """A backbone with a random adapter."""
    backbone = presets.load(str(folder)).causal_lm.backbone
    lora.enable(backbone, config.Lora(**{"rank": 3, **settings}))
    tiny.fill(backbone)
    return backbone


def one_segment(token_ids):
    return (np.tile(a, (len(token_ids), 1)) for a in tiny.layout(tiny.T))


def logits(backbone, token_ids):
    def function(*batch):
        hidden = forward.hidden_states(backbone, *batch)
        return forward.logits(backbone, hidden)

    return tiny.compute(function, token_ids, *one_segment(token_ids))


def as_float64(variable):
    return ops.convert_to_numpy(variable.value).astype("float64")


@pytest.fixture(scope="module", params=["keras", "standard"])
def everywhere(request, folder):
    """(style, a backbone adapted in every target)."""
    return request.param, tuned(folder, style=request.param, alpha=6.0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 7.0])
def test_project_is_the_dense_product(everywhere, alpha, rslora):
    style, backbone = everywhere
    before = backbone.lora
    backbone.lora = config.Lora(rank=3, alpha=alpha, rslora=rslora, style=style)
    # alpha 0 stands for alpha = rank.
    scale = (alpha or 3.0) / (3.0**0.5 if rslora else 3.0)
    block = backbone.transformer_layers[1]
    rng = np.random.default_rng(0)
    for target, (apply, *multiply) in PRODUCTS.items():
        dense = lora.layer(block, target)
        w, a, b = map(
            as_float64,
            (dense._kernel, dense.lora_kernel_a, dense.lora_kernel_b),
        )
        width = w.shape[:-1] if target == "attention_output" else w.shape[-2:-1]
        x = rng.normal(size=(2, 5, *width)).astype("float32")
        product = np.einsum(multiply[style == "standard"], a, b)
        want = np.einsum(apply, x.astype("float64"), w + scale * product)
        (got,) = project(backbone, block, [target], ops.reshape(x, (2, 5, -1)))
        got = ops.convert_to_numpy(got).reshape(want.shape)
        tiny.close(target, got, want, atol=1e-5, rtol=1e-5)
    backbone.lora = before


def project(backbone, block, targets, x, **more):
    frozen = lora.kernels_of(backbone, block, targets, x.dtype)
    return lora.project(backbone, block, frozen, x, **more)


def test_targets_of_one_input_are_projected_together(everywhere):
    _, backbone = everywhere
    block = backbone.transformer_layers[2]
    x = ops.convert_to_tensor(
        np.random.default_rng(1).normal(size=(2, 5, 40)).astype("float32")
    )
    for names in (["query", "key", "value"], ["ffw_gating", "ffw_gating_2"]):
        together = project(backbone, block, names, x)
        for name, got in zip(names, together):
            (want,) = project(backbone, block, [name], x)
            got, want = map(ops.convert_to_numpy, (got, want))
            tiny.close(name, got, want, atol=1e-5, rtol=1e-5)


def test_adapters_alone_are_trained(everywhere):
    style, backbone = everywhere
    names = ("lora_kernel_a", "lora_kernel_b")
    trained = backbone.trainable_variables
    assert len(trained) == 2 * 7 * backbone.num_layers
    assert {v.path.rpartition("/")[2] for v in trained} == set(names)
    assert {str(v.dtype) for v in trained} == {"float32"}
    pairs = [v for pair in lora.variables(backbone).values() for v in pair]
    assert {id(v) for v in pairs} == {id(v) for v in trained}
    # Per block, with d 40, f 56, n 4, k 2, h 16, r 3.
    heads = 40 * (4 + 2 + 2) + 3 * 16 if style == "keras" else 3 * 40 + 8 * 16
    rest = (64 + 40) + 3 * (40 + 56)
    count = sum(int(np.prod(v.shape)) for v in trained)
    assert count == 3 * 3 * (heads + rest)


@BOTH
def test_only_the_named_targets(folder, style):
    backbone = presets.load(str(folder)).causal_lm.backbone
    settings = config.Lora(rank=2, targets="value,ffw_linear", style=style)
    lora.enable(backbone, settings)
    found = {v.path.split("/")[-2] for v in backbone.trainable_variables}
    assert found == {"value", "ffw_linear"}
    assert len(backbone.trainable_variables) == 4 * backbone.num_layers
    # B starts at zero: nothing has changed yet.
    plain = presets.load(str(folder)).causal_lm.backbone
    token_ids = tiny.ids(1, tiny.T)
    got, want = logits(backbone, token_ids), logits(plain, token_ids)
    np.testing.assert_array_equal(got, want)
    for a, b in lora.variables(backbone).values():
        assert np.abs(as_float64(a)).max() > 0 == np.abs(as_float64(b)).max()


def test_unknown_target_is_refused(everywhere):
    settings = config.Lora(targets="query,valeu")
    with pytest.raises(config.UserError, match="valeu.*Did you mean: value"):
        lora.enable(everywhere[1], settings)


@pytest.mark.parametrize(
    "style,targets",
    [
        ("keras", "all-linear"),
        ("keras", "attention"),
        ("standard", "all-linear"),
        ("standard", "attention"),
    ],
)
def test_other_readers_compute_our_logits(folder, tmp_path, style, targets):
    import keras_hub
    import peft

    ours = tuned(folder, style=style, targets=targets, alpha=5.0)
    token_ids = tiny.ids(2, tiny.T)
    want = logits(ours, token_ids)
    adapter = lora.read(ours)
    adapters.write_peft(tmp_path / "adapter", adapter)
    base = tiny.witness(folder)
    with torch.no_grad():
        plain = base(torch.tensor(token_ids).long()).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        got = theirs(torch.tensor(token_ids).long()).logits
    assert (got - plain).abs().max() > 1
    tiny.close("PEFT", got, want, atol=2e-4)

    path = tmp_path / "adapter.lora.h5"
    index = adapters.layer_index(ours.num_layers)
    adapters.write_keras(path, adapter, index)
    stock = keras_hub.models.GemmaBackbone.from_preset(
        str(folder), dtype="float32"
    )
    names = list(config.TARGETS[: 4 if targets == "attention" else 7])
    stock.enable_lora(adapters.stock_rank(adapter), target_layer_names=names)
    stock.load_lora_weights(str(path))

    def function(token_ids, padding_mask):
        hidden = stock({"token_ids": token_ids, "padding_mask": padding_mask})
        return stock.token_embedding(hidden, reverse=True)

    got = tiny.compute(function, token_ids, np.ones_like(token_ids))
    tiny.close("KerasHub", got, want, atol=2e-4)


def test_an_adapter_that_peft_made(folder, tmp_path):
    import peft

    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        tiny.witness(folder),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
            rank_pattern={"k_proj": 2},
            init_lora_weights=False,
        ),
    ).eval()
    theirs.save_pretrained(tmp_path)
    backbone = presets.load(str(folder)).causal_lm.backbone
    adapter = lora.load(backbone, tmp_path)
    assert (adapter.style, adapter.rank) == ("standard", 4)
    token_ids = tiny.ids(2, tiny.T)
    with torch.no_grad():
        want = theirs(torch.tensor(token_ids).long()).logits
        with theirs.disable_adapter():
            plain = theirs(torch.tensor(token_ids).long()).logits
    assert (want - plain).abs().max() > 1
    tiny.close("from PEFT", logits(backbone, token_ids), want, atol=2e-4)


# --- dropout -----------------------------------------------------------------


def seeds(count=1):
    """What a FineTuner draws for its first steps."""
    generator = keras.random.SeedGenerator(7)
    return [generator.next() for _ in range(count)]


@pytest.fixture(scope="module")
def dropping(folder):
    return tuned(folder, targets="ffw_linear", dropout=0.25)


def test_dropout_rate_and_scale(dropping):
    block = dropping.transformer_layers[0]
    dense = lora.layer(block, "ffw_linear")
    pair = dense.lora_kernel_a, dense.lora_kernel_b
    before = [ops.convert_to_numpy(v.value) for v in pair]
    # x A B is then feature 0 of x, in every output; W is taken as 0.
    pair = *pair, dense._kernel
    before.append(ops.convert_to_numpy(dense._kernel.value))
    a, b, w = (np.zeros(v.shape) for v in pair)
    a[0, 0], b[0] = 1.0, 1.0
    for variable, value in zip(pair, (a, b, w)):
        variable.assign(value)

    def kept(seed):
        (delta,) = project(
            dropping, block, ["ffw_linear"], ops.ones((64, 64, 56)), seed=seed
        )
        return ops.convert_to_numpy(delta)[..., 0]

    (seed,) = seeds()
    once, evaluated = kept(seed), kept(None)
    for variable, value in zip(pair, before):
        variable.assign(value)
    np.testing.assert_allclose(np.unique(once), [0, 1 / 0.75], rtol=1e-6)
    # 4096 draws: the deviation of their share is 0.0068.
    np.testing.assert_allclose((once == 0).mean(), 0.25, atol=0.03)
    np.testing.assert_array_equal(evaluated, 1.0)


def test_no_two_dropouts_of_a_run_share_a_seed(everywhere, monkeypatch):
    """Over steps, blocks and targets, as Keras's own layers would have it."""
    _, backbone = everywhere
    settings = dataclasses.replace(backbone.lora, dropout=0.25)
    monkeypatch.setattr(backbone, "lora", settings)
    batch = [ops.convert_to_tensor(a) for a in (tiny.ids(1, 4),)]
    batch += [ops.convert_to_tensor(a) for a in tiny.layout(4, size=4)]

    def drawn(seed):
        found = []

        def dropout(x, rate, seed):
            found.append(seed.next())
            return x

        def on_torch(x, rate, first, second):
            found.append(ops.stack([first, second]))
            return x

        with monkeypatch.context() as patch:
            patch.setattr(keras.random, "dropout", dropout)
            patch.setattr(kernels, "dropout", on_torch)
            forward.hidden_states(backbone, *batch, seed=seed)
        return ops.stack(found)

    found = [tiny.compute(drawn, seed) for seed in seeds(30)]
    found = np.concatenate(found).tolist()
    assert len(found) == 30 * 3 * 7
    assert len({tuple(words) for words in found}) == len(found)


def test_dropout_under_recomputation(dropping):
    token_ids = tiny.ids(2, tiny.T)
    batch = [
        ops.convert_to_tensor(a) for a in (token_ids, *one_segment(token_ids))
    ]

    def value(seed, recompute=False):
        hidden = forward.hidden_states(
            dropping, *batch, recompute=recompute, seed=seed
        )
        return ops.sum(ops.square(hidden[..., :7]))

    def gradients(recompute):
        return tiny.differentiate(
            lambda: value(first, recompute), dropping.trainable_variables
        )()

    first, second = seeds(2)
    want, plain = gradients(False)
    got, recomputed = gradients(True)
    tiny.close("value", got, want, rtol=1e-6)
    for variable, once, twice in zip(
        dropping.trainable_variables, plain, recomputed
    ):
        scale = np.abs(once).max()
        assert scale > 1e-2
        tiny.close(variable.path, twice / scale, once / scale, atol=1e-5)
    # Another step, and evaluation, have other values: dropout is on.
    others = [tiny.compute(value, second), tiny.compute(lambda: value(None))]
    assert min(abs(other / want - 1) for other in others) > 1e-3
