"""The chunked loss: values, gradients, and that [N, V] never exists.

Witnesses: the definition in float64 NumPy, and torch's cross_entropy with
autograd in float64.
"""

import json

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops

from keras_gemma_ft.model import kernels, layouts, sharding
from keras_gemma_ft.tuning import chunks, loss

# B, T, d, V; 21 tokens: chunks of 7 divide them, those of 4 leave a tail.
B, T, D, V = 3, 7, 10, 33
CAPS = pytest.mark.parametrize("cap", [30.0, None])


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    # Logits up to 70: the cap bites.
    hidden = rng.normal(0, 2, (B, T, D)).astype("float32")
    table = rng.normal(0, 2, (V, D)).astype("float32")
    y = rng.integers(0, V, (B, T)).astype("int32")
    weight = rng.uniform(0, 1, (B, T)).astype("float32")
    weight[1, 2:5] = 0.0
    return hidden, table, y, weight


def by_definition(hidden, table, y, cap):
    """float64 losses [B, T]."""
    z = hidden.astype("float64") @ table.astype("float64").T
    if cap is not None:
        z = cap * np.tanh(z / cap)
    top = z.max(-1, keepdims=True)
    total = np.log(np.exp(z - top).sum(-1)) + top[..., 0]
    return total - np.take_along_axis(z, y[..., None], -1)[..., 0]


def by_torch(hidden, table, y, weight, cap):
    """(losses, d/dhidden, d/dtable) of sum(weight * losses), float64."""
    h, e = (torch.tensor(a).double().requires_grad_() for a in (hidden, table))
    z = (h @ e.T).flatten(0, 1)
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    labels = torch.tensor(y).long().flatten()
    losses = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (losses * torch.tensor(weight).flatten()).sum().backward()
    return (
        losses.detach().numpy().reshape(y.shape),
        h.grad.numpy(),
        e.grad.numpy(),
    )


def value_and_gradients(data, wanted, **settings):
    """(value, gradients) of the weighted sum; `wanted` of hidden, table."""
    hidden, table, y, weight = data
    arrays = {"hidden": hidden, "table": table}
    variables = {name: keras.Variable(arrays[name]) for name in arrays}

    def function():
        losses = loss.token_loss(
            # A tensor, as a forward pass gives it, not TensorFlow's variable.
            variables["hidden"].value * 1.0,
            variables["table"].value,
            ops.convert_to_tensor(y),
            **settings,
        )
        return ops.sum(losses * ops.convert_to_tensor(weight))

    return tiny.differentiate(function, [variables[n] for n in wanted])()


@pytest.mark.parametrize("table_trained", [False, True])
@CAPS
def test_values(data, cap, table_trained):
    hidden, table, y, weight = data
    want = by_definition(hidden, table, y, cap)
    tiny.close(
        "witnesses", by_torch(*data, cap)[0], want, atol=1e-12, rtol=1e-12
    )
    for chunk in (1, 4, 100):

        def function(hidden, table, y):
            return loss.token_loss(
                hidden,
                table,
                y,
                cap=cap,
                chunk=chunk,
                table_trained=table_trained,
            )

        got = tiny.compute(function, hidden, table, y)
        assert got.shape == (B, T) and got.dtype == np.float32
        tiny.close(f"chunk {chunk}", got, want, atol=2e-5, rtol=1e-6)


@CAPS
@pytest.mark.parametrize("chunk", [0, 4, 7])
@pytest.mark.parametrize("table_trained", [False, True])
def test_gradients(data, cap, chunk, table_trained):
    losses, *wants = by_torch(*data, cap)
    wanted = ["hidden", "table"] if table_trained else ["hidden"]
    value, gots = value_and_gradients(
        data, wanted, cap=cap, chunk=chunk, table_trained=table_trained
    )
    tiny.close("value", value, (losses * data[3]).sum(), rtol=1e-6)
    for name, got, want in zip(wanted, gots, wants):
        scale = np.abs(want).max()
        tiny.close(name, got / scale, want / scale, atol=2e-6)
    # What has weight 0 teaches nothing.
    assert not gots[0][1, 2:5].any()


@pytest.mark.parametrize("words", [1, 5, 16])
def test_blocks_of_words_are_the_whole_table(data, words, monkeypatch):
    # The chunk is of 8 tokens; 19 words are no multiple of a block.
    monkeypatch.setattr(chunks, "BYTES", 4 * 8 * words)
    losses, want, _ = by_torch(*data, 30.0)
    value, (got,) = value_and_gradients(data, ["hidden"], cap=30.0, chunk=8)
    tiny.close("value", value, (losses * data[3]).sum(), rtol=1e-6)
    scale = np.abs(want).max()
    tiny.close("hidden", got / scale, want / scale, atol=2e-6)


@pytest.mark.parametrize("chunk", [0, 4])
def test_tokens_of_no_weight_are_left_out(data, chunk):
    hidden, table, y, weight = data
    want = np.where(weight != 0, by_definition(hidden, table, y, 30.0), 0.0)

    def function(hidden, table, y, weight):
        return loss.token_loss(hidden, table, y, weight, cap=30.0, chunk=chunk)

    got = tiny.compute(function, hidden, table, y, weight)
    tiny.close("losses", got, want, atol=2e-5, rtol=1e-6)
    nothing = tiny.compute(function, hidden, table, y, 0 * weight)
    np.testing.assert_array_equal(nothing, 0.0)
    # Their hidden states are not even looked at.
    hidden = np.where(weight[..., None] != 0, hidden, np.nan)
    if (weight == 0).sum(1).min() >= chunk > 0:
        blind = tiny.compute(function, hidden, table, y, weight)
        np.testing.assert_array_equal(blind[weight != 0], got[weight != 0])


@pytest.mark.parametrize("chunk", [0, 4, 7])
def test_gradients_of_weighted_tokens(data, chunk):
    losses, want, _ = by_torch(*data, 30.0)
    weight = ops.convert_to_tensor(data[3])
    value, (got,) = value_and_gradients(
        data, ["hidden"], cap=30.0, chunk=chunk, weight=weight
    )
    tiny.close("value", value, (losses * data[3]).sum(), rtol=1e-6)
    scale = np.abs(want).max()
    tiny.close("hidden", got / scale, want / scale, atol=2e-6)


def test_without_gradient_the_losses_are_the_same(data):
    hidden, table, y, weight = data

    def function(hidden, table, y, weight):
        return [
            loss.token_loss(
                hidden, table, y, weight, cap=30.0, chunk=4, training=training
            )
            for training in (False, True)
        ]

    plain, trained = tiny.compute(function, hidden, table, y, weight)
    tiny.close("losses", plain, trained, atol=2e-6)


def test_frozen_table_gets_no_gradient(data):
    """dh is right without it, and asking for it finds nothing."""
    if keras.config.backend() == "jax":
        _, (got,) = value_and_gradients(data, ["table"], cap=30.0, chunk=4)
        np.testing.assert_array_equal(got, 0.0)
    else:
        # Torch: "not used in the graph"; TensorFlow: None is no tensor.
        with pytest.raises((RuntimeError, ValueError)):
            value_and_gradients(data, ["table"], cap=30.0, chunk=4)


@pytest.mark.parametrize("table_trained", [False, True])
def test_16_bit_hidden_states(data, table_trained):
    """Logits and losses stay float32; the error is that of the matmul."""
    hidden, table, y, _ = data
    rounded = [
        ops.convert_to_numpy(ops.cast(ops.cast(a, "bfloat16"), "float32"))
        for a in (hidden, table)
    ]
    want = by_definition(*rounded, y, 30.0)

    def function(hidden, table, y):
        return loss.token_loss(
            ops.cast(hidden, "bfloat16"),
            ops.cast(table, "bfloat16"),
            y,
            cap=30.0,
            chunk=8,
            table_trained=table_trained,
        )

    got = tiny.compute(function, hidden, table, y)
    assert got.dtype == np.float32
    # A bfloat16 logit of 32 to 64 is rounded by at most 1/8, twice here.
    tiny.close("bfloat16", got, want, atol=0.25)


# Of the gradient's size. A tenth of it is missing without the cap's slope.
PRECISION = {"bfloat16": 1e-2, "float16": 1.5e-3}
# float16 could not hold the second itself: a loss scale that has grown.
SCALES = [1.0, 2.0**17]


def apart_in_16_bits(dtype, scale, *, rows=B, words=V, sure=False, **settings):
    """|dh - float64's| / |float64's| of a head in `dtype`, loss * scale.

    sure: the right word has logit 16, all others have 0.
    """
    rng = np.random.default_rng(0)
    # Logits up to 70; a table's numbers are small, and so dh is in range.
    hidden = rng.normal(0, 64, (rows, T, D))
    table = rng.normal(0, 1 / 16, (words, D))
    y = rng.integers(0, words, (rows, T)).astype("int32")
    if sure:
        table[:], y[:] = np.resize([1 / 16, -1 / 16], D), 0
        table[0], hidden[:] = 1 / 16, 28.5
    rounded = [
        ops.convert_to_numpy(ops.cast(ops.cast(a, dtype), "float32"))
        for a in (hidden, table)
    ]
    weight = rng.uniform(0, 1, (rows, T)).astype("float32")
    weight[1, 2:5] = 0.0
    _, want, _ = by_torch(*rounded, y, weight, 30.0)
    with keras.name_scope("token_embedding"):
        table = keras.Variable(rounded[1], dtype=dtype, name="embeddings")
    hidden = keras.Variable(rounded[0])

    def run():
        found = loss.token_loss(
            # What a head in 16 bits is given: its input, cast.
            ops.cast(hidden.value, dtype),
            ops.convert_to_tensor(table),
            ops.convert_to_tensor(y),
            cap=30.0,
            **settings,
        )
        return ops.sum(found * ops.convert_to_tensor(weight)) * scale

    _, (got,) = tiny.differentiate(run, [hidden])()
    apart = np.linalg.norm(got / scale - want) / np.linalg.norm(want)
    return float(apart)


@pytest.fixture
def multiplied(monkeypatch):
    """16 bits are, where a CPU would multiply float32, in blocks of words."""
    monkeypatch.setattr(kernels, "slow", lambda x: False)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("chunk", [0, 8])
def test_16_bit_gradients(multiplied, chunk, dtype, scale):
    apart = apart_in_16_bits(dtype, scale, chunk=chunk)
    print(f"16-bit gradient, {dtype}: {apart:.1e}")
    assert apart < PRECISION[dtype]


def test_float16_gradients_of_unlikely_words(multiplied):
    """4,095 words of a share of 9e-8 each, where float16 steps by 6e-8."""
    apart = apart_in_16_bits("float16", 2.0**10, words=4096, sure=True)
    print(f"unlikely words: {apart:.1e}")
    assert apart < 1e-2


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="the compiler is Torch's"
)
@pytest.mark.parametrize("dtype", PRECISION)
def test_16_bit_gradients_compiled(multiplied, dtype, monkeypatch):
    run = torch.compile(
        chunks.losses_and_dz, dynamic=False, fullgraph=True,
        backend="aot_eager_decomp_partition",
    )  # fmt: skip
    monkeypatch.setattr(chunks, "_compiled", lambda: run)
    for scale in SCALES:
        apart = apart_in_16_bits(dtype, scale, chunk=8, compiled=True)
        assert apart < PRECISION[dtype]


@pytest.mark.parametrize("dtype", PRECISION)
def test_16_bits_multiplied_as_float32(dtype, monkeypatch):
    """As CPUs do that have no instructions for them: in blocks of words."""
    monkeypatch.setattr(kernels, "slow", lambda x: "32" not in str(x.dtype))
    for scale in SCALES:
        assert apart_in_16_bits(dtype, scale) < PRECISION[dtype]


@pytest.mark.skipif(keras.config.backend() != "jax", reason="meshes are JAX's")
def test_16_bit_gradients_with_the_words_on_a_mesh():
    told = tiny.on_devices(__file__, 4)
    assert told["words"] == [8]
    for dtype, limit in PRECISION.items():
        assert told[dtype] < limit


def on_mesh():
    """Words of a part of a table on 1 x 4 devices, and the 16-bit gradients."""
    grid = keras.distribution.DeviceMesh((1, 4), [layouts.BATCH, layouts.MODEL])
    keras.distribution.set_distribution(sharding.Sharded(grid))
    with keras.name_scope("token_embedding"):
        table = keras.Variable(np.ones((32, D)), name="embeddings")
    parts = {x.data.shape[0] for x in table.value.addressable_shards}
    kinds = {
        dtype: max(
            apart_in_16_bits(dtype, scale, rows=4, words=32, chunk=8)
            for scale in SCALES
        )
        for dtype in PRECISION
    }
    return {"words": sorted(parts), **kinds}


def test_chunk_size():
    # 24 MiB of float32 logits of 16,384 words are 384 tokens.
    assert loss.chunk_size(4096, 16_384) == 384
    assert loss.chunk_size(100, 16_384) == 100
    assert loss.chunk_size(4096, 16_384, 512) == 512
    assert loss.chunk_size(4096, 256_000) == 256
    assert loss.chunk_size(4096, 256_000, by_words=True) == 1024
    assert loss.chunk_size(4096, 256_000, 512, by_words=True) == 512


def sizes(jaxpr):
    """How many numbers each array in a traced program has, inner ones too."""
    import jax

    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape))
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="only JAX shows its program; the arithmetic is the same code",
)
@pytest.mark.parametrize("table_trained", [False, True])
def test_logits_of_all_tokens_never_exist(table_trained):
    import jax

    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, 64, 4)).astype("float32")
    table = rng.normal(size=(1000, 4)).astype("float32")
    y = rng.integers(0, 1000, (8, 64)).astype("int32")

    def largest(chunk):
        def total(hidden, table):
            return ops.sum(
                loss.token_loss(
                    hidden,
                    table,
                    ops.convert_to_tensor(y),
                    cap=30.0,
                    chunk=chunk,
                    table_trained=table_trained,
                )
            )

        which = (0, 1) if table_trained else 0
        traced = jax.make_jaxpr(jax.value_and_grad(total, which))(hidden, table)
        return max(sizes(traced.jaxpr))

    assert largest(512) == 512 * 1000
    # One chunk's logits are the largest array there is.
    assert largest(16) == 16 * 1000
    if table_trained:
        return
    # And they are held once, not kept for a backward pass.
    compiled = (
        jax.jit(
            jax.grad(
                lambda h: ops.sum(
                    loss.token_loss(h, table, y, cap=30.0, chunk=16)
                )
            )
        )
        .lower(hidden)
        .compile()
    )
    used = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporary memory: {used:,} bytes")
    assert used < 512 * 1000 * 4 / 4


if __name__ == "__main__":
    print(json.dumps(on_mesh()))
