"""The decoder's blocks as one loop, so that compiling does not grow with depth.

JAX only. 42 unrolled, recomputed blocks take XLA more than 20 GB of a host's
memory to compile for a TPU; as a loop 2 GB. The loop's body holds as many
blocks as kinds alternate (window, global). Weights stay the variables they
are: a `switch` picks those of a turn, which costs a copy of one body's weights,
where stacking them would copy all. Adapters and norms are small and stacked.
"""

import functools

import keras
from keras import ops

from keras_gemma_ft.model import kernels, sharding

_INPUT = "block input"


def unrolled(run, layers, seeds, x, recompute):
    """As `blocks`, one block after the other, on every backend."""
    finite = []
    for i, layer in enumerate(layers):
        seed = None if seeds is None else seeds[i]
        one = functools.partial(run, layer, seed)
        if recompute:
            one = keras.remat(one)
        elif sharding.split() or kernels.on_gpu():
            one = _keeping(one, kernels.KEPT)
        x = one(x)
        finite.append(kernels.finite(x))
    return x, ops.stack(finite) if finite else None


def blocks(run, layers, seeds, x, recompute):
    """x through every block.

    Args:
        run: function of (block, seed, x) -> x that reads the block's
            variables.
        layers: the decoder blocks, of one shape.
        seeds: [layers, 2] of dropout, or None.
        x: [B, T, d].
        recompute: keep only the blocks' inputs for the backward pass.

    Returns:
        (x, bool [blocks, B]: where a block gave finite numbers only).
    """
    import jax

    size = len({layer.use_sliding_window_attention for layer in layers})
    turns = len(layers) // size
    bodies = [layers[i * size : (i + 1) * size] for i in range(turns)]
    values = [[v for layer in body for v in layer.variables] for body in bodies]
    template = values[0]
    # What is trained must be stacked: its gradient comes back the same way.
    stacked = [v.trainable or len(v.shape) < 2 for v in template]
    whole = [
        ops.stack([ops.convert_to_tensor(turn[i]) for turn in values])
        for i, small in enumerate(stacked)
        if small
    ]
    large = [
        [ops.convert_to_tensor(v) for v, s in zip(turn, stacked) if not s]
        for turn in values
    ]

    def body(x, turn):
        finite = []
        number, small, seed = turn
        picked = iter(_pick(number, large))
        small = iter(small)
        mapping = [
            (v, next(small if s else picked)) for v, s in zip(template, stacked)
        ]
        with keras.StatelessScope(state_mapping=mapping):
            for j, layer in enumerate(bodies[0]):
                one = functools.partial(
                    run, layer, None if seed is None else seed[j]
                )
                x = jax.ad_checkpoint.checkpoint_name(x, _INPUT)
                x = jax.checkpoint(one)(x) if recompute else one(x)
                finite.append(kernels.finite(x))
        return x, ops.stack(finite)

    some = None
    if seeds is not None:
        some = ops.reshape(seeds[: turns * size], (turns, size, -1))
    turn = (ops.arange(turns), whole, some)
    # Left alone, a loop keeps the weights that it picked, too, turn by turn.
    step = _keeping(body, *[kernels.KEPT] * (not recompute))
    x, finite = jax.lax.scan(step, x, turn)
    done = turns * size
    finite = ops.reshape(finite, (done, x.shape[0]))
    rest = None if seeds is None else seeds[done:]
    x, more = unrolled(run, layers[done:], rest, x, recompute)
    if more is not None:
        finite = ops.concatenate([finite, more])
    return x, finite


def _keeping(run, *names):
    """run, whose backward pass has the blocks' inputs and `names`, no more."""
    import jax

    keep = jax.checkpoint_policies.save_only_these_names(_INPUT, *names)
    return jax.checkpoint(run, policy=keep)


def parts(run, x, size, weights):
    """run(x[:, first : first + size], number, *weights) side by side.

    Args:
        run: function of (x [B, t, d], number, *weights) -> [B, t, d]; it is
            recomputed in the backward pass.
        x: [B, T, d].
        size: tokens a row of a part; the last may have fewer.
        weights: tensors.
    """
    rows, t, d = x.shape
    whole = t // size * size
    outs = []
    if keras.config.backend() == "jax":
        import jax

        some = ops.reshape(x[:, :whole], (rows, -1, size, d))
        step = jax.checkpoint(run)
        _, done = jax.lax.scan(
            lambda number, x: (number + 1, step(x, number, *weights)),
            ops.zeros((), "int32"),
            ops.moveaxis(some, 1, 0),
        )
        outs.append(ops.reshape(ops.moveaxis(done, 0, 1), (rows, whole, d)))
        run, first = step, whole
    else:
        run, first = keras.remat(run), 0
    for at in range(first, t, size):
        outs.append(run(x[:, at : at + size], at // size, *weights))
    return outs[0] if len(outs) == 1 else ops.concatenate(outs, 1)


def _pick(number, turns):
    """The arrays of turn `number`, copied; none of them is trained."""
    import jax

    turns = [[jax.lax.stop_gradient(v) for v in turn] for turn in turns]
    if not turns[0]:
        return []
    return jax.lax.switch(number, [lambda turn=turn: turn for turn in turns])
