"""AdamW in 8 bits: against a NumPy one with the paper's map, and AdamW.

The witness looks for the nearest of the 256 values that bitsandbytes'
`create_dynamic_map` lists, in float64, and knows nothing of decades.
"""

import json
import types

import keras
import numpy as np
import pytest
import tiny
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.model import layouts, sharding
from keras_gemma_ft.planning import arithmetic, devices, shapes
from keras_gemma_ft.tuning import adamw8, checkpoint, optimizer

BACKEND = keras.config.backend()
# Blocks along the last axis; flat ones, the last not full; float32.
SHAPES = {"along": (3, 4, 512), "flat": (50, 101), "small": (9,)}
RATE, DECAY = 0.01, 0.1


def paper_map(signed):
    """bitsandbytes' create_dynamic_map(signed, 7, 8), bins by linspace."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(values)


def stored(x, signed):
    """float64 [N] as it is read back, in blocks of 256."""
    table = paper_map(signed)
    blocks = np.pad(x, (0, -len(x) % 256)).reshape(-1, 256)
    top = np.abs(blocks).max(-1, keepdims=True)
    unit = blocks / np.maximum(top, 1e-300)
    code = np.abs(unit[..., None] - table).argmin(-1)
    if not signed:
        code = np.maximum(code, 1)
    return (table[code] * top).ravel()[: len(x)]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_the_papers_map(signed):
    table = paper_map(signed)
    assert len(table) == 256
    np.testing.assert_allclose(adamw8.tree(signed), table, rtol=1e-6)
    # Every code is read as its value.
    codes = ops.convert_to_tensor(np.arange(256, dtype="uint8")[None])
    got = adamw8.decode(codes, ops.ones((1,)), signed)
    np.testing.assert_allclose(ops.convert_to_numpy(got)[0], table, rtol=2e-7)
    # Ten decades, both ends among them.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 256)) * 10.0 ** rng.uniform(-9, 0, (40, 256))
    x[0], x[1, :9] = 0.0, 0.0
    x = (x if signed else np.abs(x)).astype("float32")
    codes, top = adamw8.encode(ops.convert_to_tensor(x), signed)
    back = ops.convert_to_numpy(adamw8.decode(codes, top, signed))
    want = stored(x.ravel().astype("float64"), signed).reshape(x.shape)
    top = np.abs(x).max(-1, keepdims=True)
    np.testing.assert_allclose(back, want, rtol=1e-6)
    # Of the block's largest, half the widest bin: 0.9 / 64 or 0.9 / 128.
    error = 0.9 / (128 if signed else 256) + (0.9 / 128 if signed else 0)
    assert np.all(np.abs(back - x) <= error * top)
    # The state before the first step is zero.
    nothing = ops.zeros((1, 256), "uint8")
    nothing = adamw8.decode(nothing, ops.zeros((1,)), signed)
    assert not np.any(ops.convert_to_numpy(nothing))


# --- steps -------------------------------------------------------------------


def made(kind=adamw8.AdamW8bit, shapes=None, **more):
    """(variables, a built optimizer)."""
    rng = np.random.default_rng(1)
    variables = [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=name)
        for name, shape in (shapes or SHAPES).items()
    ]
    more = {"learning_rate": RATE, "weight_decay": DECAY, **more}
    built = kind(**more)
    built.build(variables)
    return variables, built


def gradients(count, decades=5):
    """`count` lists of gradients, as unlike in size as `decades` says."""
    rng = np.random.default_rng(0)
    size = {n: 10.0 ** rng.uniform(-decades, 0, s) for n, s in SHAPES.items()}
    for _ in range(count):
        yield [
            (size[name] * rng.normal(size=shape)).astype("float32")
            for name, shape in SHAPES.items()
        ]


def stepper(variables, built):
    """A function of gradients that takes a step as Keras's `fit` does."""
    if BACKEND == "torch":
        return lambda grads: built.apply(
            [ops.convert_to_tensor(g) for g in grads], variables
        )
    if BACKEND == "tensorflow":
        import tensorflow as tf

        run = tf.function(
            lambda grads: built.apply(grads, variables), jit_compile=True
        )
        return lambda grads: run([tf.constant(g) for g in grads])
    import jax

    apply = jax.jit(built.stateless_apply)

    def step(grads):
        state = [v.value for v in built.variables]
        found = apply(state, grads, [v.value for v in variables])
        for group, values in zip((variables, built.variables), found):
            for variable, value in zip(group, values):
                variable.assign(value)

    return step


def values(variables):
    return [ops.convert_to_numpy(v.value).copy() for v in variables]


def test_steps_are_those_of_a_plain_adamw():
    """30 of them, decay and clipping included, accumulated from halves."""
    variables, built = made(global_clipnorm=5.0, gradient_accumulation_steps=2)
    step = stepper(variables, built)
    state = [[v.astype("float64").ravel(), 0.0, 0.0] for v in values(variables)]
    for t, grads in enumerate(gradients(30), 1):
        for share in (0.5, 1.5):
            step([g * np.float32(share) for g in grads])
        grads = [g.astype("float64").ravel() for g in grads]
        norm = np.sqrt(sum(np.sum(g * g) for g in grads))
        assert norm > 5.0
        for part, g, name in zip(state, grads, SHAPES):
            w, m, v = part
            g = g * 5.0 / norm
            w = w * (1 - RATE * DECAY)
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            rate = RATE * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            w = w - rate * m / (np.sqrt(v) + 1e-7)
            if name != "small":
                m, v = stored(m, True), stored(v, False)
            part[:] = w, m, v
    for got, (want, _, _), name in zip(values(variables), state, SHAPES):
        apart = np.abs(got.ravel() - want)
        # A number between two codes may go to either: few do.
        assert np.mean(apart > 1e-5) < 2e-3, name
        assert apart.max() < 0.1 * RATE, name


def test_small_variables_are_kerass_adamw_and_large_ones_are_near():
    (few, eight), (all_, plain) = made(), made(keras.optimizers.AdamW)
    one, other = stepper(few, eight), stepper(all_, plain)
    start = values(all_)
    for grads in gradients(30, decades=1):
        one(grads)
        other(grads)
    got, want = values(few), values(all_)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-6)
    for i in (0, 1):
        moved = want[i] - start[i]
        error = np.linalg.norm(got[i] - want[i]) / np.linalg.norm(moved)
        assert 1e-4 < error < 0.05


def test_a_moment_much_smaller_than_its_blocks_is_not_divided_by_zero():
    """A thousandth of the block's gradient once, then nothing: its v would
    round to zero long before its m."""
    shape = {"x": (4096,)}
    variables, built = made(shapes=shape, weight_decay=None)
    before = values(variables)[0]
    step = stepper(variables, built)
    grads = np.full(4096, 1e-4, "float32")
    grads[::256] = 1.0
    step([grads])
    for _ in range(5):
        step([np.zeros_like(grads)])
    moved = np.abs(values(variables)[0] - before)
    assert moved.max() < 8 * RATE


def test_bytes_of_the_state():
    variables, built = made()
    slots = built._momentums + built._velocities
    held = sum(
        part.nbytes
        for slot in slots
        for part in values(slot if isinstance(slot, tuple) else [slot])
    )
    blocks = 3 * 4 * 512 // 256, -(-50 * 101 // 256)
    assert held == 2 * (256 + 4) * sum(blocks) + 2 * 4 * 9
    # What a 2B in full takes, by the planner: 2 bytes and 8 / 256.
    found = {}
    for name in ("adamw", "adamw8bit"):
        cfg = config.replace(
            config.Config(),
            {"lora.rank": 0, "train.optimizer": name},
        )
        found[name] = arithmetic.estimate(
            cfg, shapes.known("2b"), devices.device("h100"), (1, 1),
            dtype="bfloat16", recompute=True,
        ).bytes["optimizer"]  # fmt: skip
    assert found["adamw"] == 8 * 2_614_341_888
    assert found["adamw8bit"] == int(2.03125 * 2_614_341_888)


def test_a_checkpoint_brings_it_back_bit_for_bit(tmp_path):
    def tuner():
        variables, built = made(name="adamw8bit")
        found = types.SimpleNamespace(
            trainable_variables=variables, optimizer=built, states=[]
        )
        return found, stepper(variables, built)

    grads = list(gradients(6))
    whole, step = tuner()
    for each in grads[:3]:
        step(each)
    checkpoint.save(tmp_path, whole, {"step": 3})
    for each in grads[3:]:
        step(each)
    again, step = tuner()
    path, _ = checkpoint.latest(tmp_path)
    checkpoint.restore(path, again)
    for each in grads[3:]:
        step(each)
    for one, two in (
        (whole.trainable_variables, again.trainable_variables),
        (whole.optimizer.variables, again.optimizer.variables),
    ):
        for x, y in zip(values(one), values(two)):
            np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(BACKEND != "torch", reason="Torch works in parts")
def test_parts_are_the_whole(monkeypatch):
    def run():
        variables, built = made()
        for grads in gradients(3):
            stepper(variables, built)(grads)
        return values([*variables, *built.variables])

    whole = run()
    monkeypatch.setattr(adamw8, "_PART", 512)
    for one, two in zip(whole, run()):
        np.testing.assert_array_equal(one, two)


def test_it_learns_as_adamw_does():
    """A two-layer model, by `optimizer.build`: loss by loss within 2 %."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 32)).astype("float32")
    y = np.tanh(x @ rng.normal(0, 0.3, (32, 16))).astype("float32")

    def losses(kind):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((32,)),
                keras.layers.Dense(256, "tanh"),
                keras.layers.Dense(16),
            ]
        )
        train = config.Train(optimizer=kind, learning_rate=3e-3)
        model.compile(
            loss="mse",
            optimizer=optimizer.build(
                train,
                model.trainable_variables,
                steps=60,
                warmup=2,
                accumulation=1,
                float16=False,
            ),
        )
        fitted = model.fit(
            x, y, batch_size=64, epochs=60, shuffle=False, verbose=0
        )
        return np.array(fitted.history["loss"])

    want, got = losses("adamw"), losses("adamw8bit")
    assert want[-1] < 0.1 * want[0]
    np.testing.assert_allclose(got, want, rtol=0.02)
    assert np.abs(got / want - 1).max() > 1e-6


# --- a mesh ------------------------------------------------------------------


def on_mesh():
    """What the states are after three steps, on 4 x 2 devices and on one."""
    names = {"ffw_gating/kernel": (64, 512), "norm/scale": (512,)}
    found = []
    for mesh in (True, False):
        keras.distribution.set_distribution(None)
        if mesh:
            grid = keras.distribution.DeviceMesh(
                (4, 2), [layouts.BATCH, layouts.MODEL]
            )
            keras.distribution.set_distribution(sharding.Sharded(grid))
        rng = np.random.default_rng(0)
        variables = []
        for name, shape in names.items():
            scope, _, last = name.partition("/")
            with keras.name_scope(scope):
                value = rng.normal(size=shape).astype("float32")
                variables.append(keras.Variable(value, name=last))
        built = adamw8.AdamW8bit(learning_rate=RATE)
        built.build(variables)
        step = stepper(variables, built)
        for _ in range(3):
            step([rng.normal(size=s).astype("float32") for s in names.values()])
        codes = built._momentums[0][0].value
        parts = {str(s.data.shape) for s in codes.addressable_shards}
        state = values([*variables, *built.variables])
        found.append((sorted(parts), state))
    apart = [
        float(np.abs(x.astype("float64") - y.astype("float64")).max())
        for x, y in zip(found[0][1], found[1][1])
    ]
    return {"parts": found[0][0], "apart": apart}


@pytest.mark.skipif(BACKEND != "jax", reason="meshes are JAX's")
def test_states_lie_as_their_variables_on_a_mesh():
    told = tiny.on_devices(__file__, 8)
    assert told["parts"] == ["(16, 256)"]
    assert max(told["apart"]) == 0


if __name__ == "__main__":
    print(json.dumps(on_mesh()))
