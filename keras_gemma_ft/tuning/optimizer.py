"""Learning-rate schedule, optimizer, clipping, accumulation, loss scale."""

import math

import keras
from keras import ops

from keras_gemma_ft.model import hosts
from keras_gemma_ft.tuning import adamw8, finite

_KINDS = {
    "adamw": keras.optimizers.AdamW,
    "adamw8bit": adamw8.AdamW8bit,
    "adam": keras.optimizers.Adam,
    "adafactor": keras.optimizers.Adafactor,
    "lion": keras.optimizers.Lion,
    "sgd": keras.optimizers.SGD,
}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant, or linear or cosine to zero.

    Counts optimizer steps: Keras passes micro-steps under accumulation.
    """

    def __init__(self, peak, *, kind, warmup, steps, accumulation=1):
        self.peak, self.kind, self.warmup = peak, kind, warmup
        self.steps, self.accumulation = steps, accumulation

    def __call__(self, step):
        step = ops.floor_divide(ops.cast(step, "int32"), self.accumulation)
        step = ops.cast(step, "float32")
        # (step + 1): the first step already learns something.
        rising = (step + 1.0) / max(1, self.warmup)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        done = ops.clip(done, 0.0, 1.0)
        falling = {
            "constant": lambda: ops.ones_like(done),
            "linear": lambda: 1.0 - done,
            "cosine": lambda: 0.5 * (1.0 + ops.cos(math.pi * done)),
        }[self.kind]()
        return self.peak * ops.minimum(rising, falling)

    def get_config(self):
        return {
            "peak": self.peak,
            "kind": self.kind,
            "warmup": self.warmup,
            "steps": self.steps,
            "accumulation": self.accumulation,
        }


def build(
    train, variables, *, steps, warmup, accumulation, float16, layers=None
):
    """The optimizer, built on `variables`.

    Args:
        train: `config.Train`.
        variables: the trainable Keras variables.
        steps: optimizer steps of the whole run.
        warmup: optimizer steps of warm-up.
        accumulation: micro-batches an optimizer step.
        float16: wrap in a dynamic loss scale.
        layers: names by which gradients that are not finite are counted;
            None counts none.

    Returns:
        A Keras optimizer whose `gradient_norm` variable holds the global norm
        of the last step's gradient before clipping, and `not_finite` the
        `finite` record of the backward passes.
    """
    schedule = Schedule(
        train.learning_rate,
        kind=train.schedule,
        warmup=warmup,
        steps=steps,
        accumulation=accumulation,
    )
    settings = {
        # A checkpoint knows variables by path: without a name it would hold
        # Keras's counter, and a notebook could not resume in one process.
        "name": train.optimizer,
        "learning_rate": schedule,
        "global_clipnorm": train.clip_norm or None,
        "gradient_accumulation_steps": (
            accumulation if accumulation > 1 else None
        ),
    }
    # AdamW decays by default (0.004): say 0 where the user says nothing.
    settings["weight_decay"] = train.weight_decay or (
        0.0 if train.optimizer == "adamw" else None
    )
    optimizer = _KINDS[train.optimizer](**settings)
    optimizer.build(variables)
    _measure(optimizer)
    if layers:
        optimizer.not_finite = optimizer.add_variable(
            (2, len(layers)), dtype="int32", name="not_finite"
        )
    if not float16:
        _count(optimizer, variables, layers)
        return optimizer
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, name="scaled")
    scaled.build(variables)
    for name in ("gradient_norm", "not_finite")[: 2 if layers else 1]:
        # Set plainly, it would be among the variables twice, and JAX refuses
        # to donate one buffer twice.
        object.__setattr__(scaled, name, getattr(optimizer, name))
    # A micro-batch that one process leaves out, all must leave out.
    check = scaled.check_finite
    scaled.check_finite = lambda grads: hosts.every(check(grads))
    _count(scaled, variables, layers)
    return scaled


def _count(optimizer, variables, layers):
    """Notes which layers' gradients are not finite, in every pass.

    Where a loss scale is, before it leaves the pass out. There, on JAX, the
    variables' new values are returned, not assigned.
    """
    if not layers:
        return
    columns = finite.columns(variables, layers)
    apply, stateless = optimizer.apply, optimizer.stateless_apply
    variable = optimizer.not_finite

    def after(kept, grads):
        bad = finite.gradients(grads, columns, layers)
        return finite.counted(kept, bad, finite.BACKWARD)

    def counting(grads, trainable_variables=None):
        variable.assign(after(variable.value, grads))
        return apply(grads, trainable_variables)

    def counting_stateless(optimizer_variables, grads, trainable_variables):
        trained, found = stateless(
            optimizer_variables, grads, trainable_variables
        )
        i = [v is variable for v in optimizer.variables].index(True)
        found = list(found)
        found[i] = after(optimizer_variables[i], grads)
        return trained, found

    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.stateless_apply = counting_stateless
    optimizer.apply = counting


def _measure(optimizer):
    """Keeps the gradient's norm, which the optimizer clips by, for the log.

    On the instance: on Torch, Keras swaps in a fused optimizer for its own
    classes only, and a subclass would fall back to one op per variable.
    """
    norm = optimizer.add_variable((), dtype="float32", name="gradient_norm")
    limit = optimizer.global_clipnorm

    def measured(grads):
        grads = _of_all(grads)
        found = _global_norm(grads)
        norm.assign(found)
        if not limit:
            return grads
        # As Keras's own: not finite where the norm is not.
        return _times(grads, limit / ops.maximum(found, limit) + found * 0.0)

    optimizer.gradient_norm = norm
    optimizer._clip_gradients = measured


def _of_all(grads):
    """Gradients of the whole batch: summed over processes, once a step."""
    given = [i for i, g in enumerate(grads) if g is not None]
    found = list(grads)
    for i, g in zip(given, hosts.summed([grads[i] for i in given])):
        found[i] = g
    return found


def _global_norm(grads):
    """The norm of all gradients as one vector, float32."""
    grads = [g for g in grads if g is not None]
    if keras.config.backend() == "torch":
        import torch

        # Two launches, not three a variable.
        return torch.stack(
            torch._foreach_norm([g.float() for g in grads])
        ).norm()
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in grads]
    return ops.sqrt(sum(squares))


def _times(grads, factor):
    """Every gradient times a scalar tensor."""
    if keras.config.backend() == "torch":
        import torch

        given = [g for g in grads if g is not None]
        found = iter(torch._foreach_mul(given, factor))
        return [g if g is None else next(found) for g in grads]
    return [g if g is None else g * factor for g in grads]
