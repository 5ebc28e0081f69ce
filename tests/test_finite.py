"""float16 that holds, and where numbers stop being finite.

Witnesses: float32 training, NumPy in float64, stock KerasHub, which breaks.
"""

import types

import keras
import numpy as np
import pytest
import tiny
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.model import compiled, kernels, presets
from keras_gemma_ft.tuning import callbacks, checkpoint, finite, trainer

BACKEND = keras.config.backend()
STEPS, ROWS = 12, 2
# With it the residual passes 65,504.
BEYOND = {"gain": 30_000.0}
# Of a block's feed-forward input: a gate by an up passes 65,504 then.
LOUD = 250.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("beyond"), **BEYOND)


def tuner_of(folder, *, dtype="float16", **more):
    """A `FineTuner` of rank-3 adapters."""
    cfg = config.replace(
        config.Config(),
        {
            "lora.rank": 3,
            "lora.targets": "all-linear",
            "data.batch_size": ROWS,
            "data.sequence_length": tiny.T,
            "train.learning_rate": 3e-3,
            **more,
        },
    )
    loaded = presets.load(str(folder), dtype=dtype)
    scale = loaded.causal_lm.backbone.transformer_layers[1].pre_ffw_norm.scale
    scale.assign(scale.value + LOUD)
    return trainer.build(cfg, loaded, steps=STEPS, warmup=1)


def batches(count):
    """The same rows again and again: their loss falls."""
    ids = tiny.ids(ROWS, tiny.T + 1)
    x = {
        "token_ids": ids[:, :-1],
        "segment_ids": np.ones((ROWS, tiny.T), "int32"),
        "positions": np.tile(np.arange(tiny.T, dtype="int32"), (ROWS, 1)),
    }
    weight = np.full((ROWS, tiny.T), 1 / (ROWS * tiny.T), "float32")
    for _ in range(count):
        yield x, ids[:, 1:], weight


def losses(tuner, steps=STEPS):
    found = tuner.fit(
        batches(steps), epochs=steps, steps_per_epoch=1, verbose=0,
        shuffle=False,
    )  # fmt: skip
    return np.array(found.history["loss"])


# --- float16 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(folder):
    return losses(tuner_of(folder, dtype="float32"))


WAYS = ["plain", "recomputed"]
WAYS += {"jax": ["loop"], "torch": ["compiled"]}.get(BACKEND, [])


def settings_of(way, monkeypatch):
    """What a run says to go one of the WAYS; no C++ is compiled."""
    monkeypatch.setattr(compiled, "inductor", quick)
    return {
        "recomputed": {"model.remat": "block"},
        "loop": {"model.scan": "on"},
        "compiled": {"model.compile": "on"},
    }.get(way, {})


@pytest.mark.parametrize("way", WAYS)
def test_float16_trains_as_float32(folder, exact, way, monkeypatch):
    tuner = tuner_of(folder, **settings_of(way, monkeypatch))
    got = losses(tuner)
    # A first pass that overflows at the scale of 2^15 is left out.
    left = sum(tuner.overflows().counts().get(finite.BACKWARD, {}).values())
    assert left < 3 and not tuner.overflows().first()
    assert finite.FORWARD not in tuner.overflows().counts()
    apart = np.abs(got[left:] / exact[: STEPS - left] - 1)
    print(
        f"float16, {way}: {apart.max():.1e} from float32's "
        f"{exact[0]:.2f} to {exact[-1]:.2f}"
    )
    assert exact[-1] < 0.9 * exact[0]
    assert apart.max() < 1e-2


def quick(graph, inputs):
    from torch._dynamo import lookup_backend

    return lookup_backend("aot_eager_decomp_partition")(graph, inputs)


def test_stock_keras_has_no_float16_for_it(folder):
    """The same weights, its own forward pass: what makes this worth a test."""
    backbone = presets.load(str(folder), dtype="float16").causal_lm.backbone
    ids = tiny.ids(ROWS, tiny.T)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    found = tiny.compute(
        lambda ids, mask: ops.cast(
            backbone({"token_ids": ids, "padding_mask": mask}), "float32"
        ),
        *inputs.values(),
    )
    assert not np.isfinite(found).all()


def test_a_gate_and_an_up_of_300():
    """Value and gradients against float64; room for 16 times as much."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.uniform(-400, 400, (6, 8)).astype("float16").astype("float32")
        for _ in range(2)
    ]
    weights = rng.normal(0, 0.01, (6, 8)).astype("float32")
    variables = [keras.Variable(a) for a in arrays]

    def run():
        gate, up = (ops.cast(v.value, "float16") for v in variables)
        out = ops.cast(kernels.gated(gate, up), "float32")
        return ops.sum(out * ops.convert_to_tensor(weights))

    gate, up = (a.astype("float64") for a in arrays)
    slope = np.sqrt(2 / np.pi)
    t = np.tanh(slope * (gate + 0.044715 * gate**3))
    gelu = 0.5 * gate * (1 + t)
    dgelu = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * slope * (
        1 + 3 * 0.044715 * gate**2
    )
    room = kernels.room("float16")
    assert room < 1 and np.abs(gelu * up).max() > 65504
    value, got = tiny.differentiate(run, variables)()
    scaled = weights.astype("float64") * room
    tiny.close("value", value, (gelu * up * scaled).sum(), rtol=2e-3)
    for name, g, w in zip(
        ("gate", "up"), got, (up * dgelu * scaled, gelu * scaled)
    ):
        tiny.close(f"d{name}", g, w, atol=2e-3 * np.abs(w).max())


# --- where it began -----------------------------------------------------------


def by_hand(passes, direction):
    """A record of passes, each a row of flags, in plain Python."""
    counts, row = np.zeros((2, passes.shape[1]), "int32")
    for bad in passes:
        places = np.flatnonzero(bad)
        if not len(places):
            row[:] = 0
            continue
        began = places[0 if direction == finite.FORWARD else -1]
        counts[began] += 1
        if row.any():
            row[row > 0] += 1
        else:
            row[began] = 1
    return np.stack([counts, row])


@pytest.mark.parametrize("direction", [finite.FORWARD, finite.BACKWARD])
def test_passes_are_counted_where_they_began(direction):
    rng = np.random.default_rng(0)
    passes = rng.uniform(size=(40, 5)) < 0.25
    kept = ops.zeros((2, 5), "int32")
    for i, bad in enumerate(passes):
        kept = finite.counted(kept, ops.convert_to_tensor(bad), direction)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(kept), by_hand(passes[: i + 1], direction)
        )


def spoil(tuner, block):
    """Makes a block's output infinite, as a weight that overflowed."""
    scale = tuner.backbone.transformer_layers[block].post_ffw_norm.scale
    scale.assign(np.full(scale.shape, np.inf))


@pytest.mark.parametrize(
    "way, dtype", [("plain", "float32"), *((way, "float16") for way in WAYS)]
)
def test_the_first_block_is_named(folder, way, dtype, monkeypatch):
    more = settings_of(way, monkeypatch)
    tuner = tuner_of(folder, dtype=dtype, **more)
    losses(tuner, 4)
    assert not tuner.overflows().first()
    spoil(tuner, 1)
    losses(tuner, 3)
    found = tuner.overflows()
    assert found.first() == "the output of decoder_block_1"
    counts = found.counts()[finite.FORWARD]
    # In float32 the first such update spoils every adapter, block 0's too.
    assert counts["decoder_block_1"] == (3 if dtype == "float16" else 1)


def test_a_spoilt_gradient_is_named_and_left_out(folder):
    """float16: the scale halves, the weights stay, until it falls below 1."""
    tuner = tuner_of(folder)
    before = [
        ops.convert_to_numpy(v.value).copy() for v in tuner.trainable_variables
    ]
    grads = [np.zeros(v.shape, "float32") for v in tuner.trainable_variables]
    places = [
        i
        for i, v in enumerate(tuner.trainable_variables)
        if "decoder_block_1" in v.path or "decoder_block_0" in v.path
    ]
    for i in places:
        grads[i][..., 0] = np.inf
    for _ in range(16):
        applied(tuner, grads)
    for v, old in zip(tuner.trainable_variables, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(v.value), old)
    found = tuner.overflows()
    assert found.counts() == {finite.BACKWARD: {"decoder_block_1": 16}}
    assert found.first() == "the gradient of decoder_block_1"
    stop = callbacks.StopOnNaN()
    stop.set_model(types.SimpleNamespace(optimizer=tuner.optimizer))
    stop.on_epoch_end(0, {"loss": 1.0})
    assert stop.model.stopped == "the loss scale has fallen to 0.5"
    assert np.isnan(stop.model.last_loss)


def applied(tuner, grads):
    """One update, as Keras's trainer of this backend makes it."""
    optimizer = tuner.optimizer
    grads = [ops.convert_to_tensor(g) for g in grads]
    if BACKEND != "jax":
        optimizer.apply(grads, tuner.trainable_variables)
        return
    trained, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        grads,
        [v.value for v in tuner.trainable_variables],
    )
    for v, value in zip(
        [*tuner.trainable_variables, *optimizer.variables], [*trained, *state]
    ):
        v.assign(value)


def test_counts_survive_a_checkpoint(folder, tmp_path):
    tuner = tuner_of(folder)
    spoil(tuner, 1)
    losses(tuner, 2)
    want = tuner.overflows()
    assert want.counts()[finite.FORWARD] == {"decoder_block_1": 2}
    checkpoint.save(tmp_path, tuner, {"step": 2})
    again = tuner_of(folder)
    checkpoint.restore(checkpoint.latest(tmp_path)[0], again)
    got = again.overflows()
    assert got.counts() == want.counts() and got.first() == want.first()


def test_records_of_several_processes_are_one():
    one = [[0, 2, 0], [0, 1, 0]]
    two = [[0, 0, 3], [0, 0, 4]]
    np.testing.assert_array_equal(
        finite._joined([one, two]), [[0, 2, 3], [0, 0, 4]]
    )
