"""Learning-rate schedule, optimizer, clipping, accumulation, loss scale."""

import math

import keras
from keras import ops

from keras_gemma_ft.tuning import adamw8

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


def build(train, variables, *, steps, warmup, accumulation, float16):
    """The optimizer, built on `variables`.

    Args:
        train: `config.Train`.
        variables: the trainable Keras variables.
        steps: optimizer steps of the whole run.
        warmup: optimizer steps of warm-up.
        accumulation: micro-batches an optimizer step.
        float16: wrap in a dynamic loss scale.

    Returns:
        A Keras optimizer whose `gradient_norm` variable holds the global norm
        of the last step's gradient before clipping.
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
    if not float16:
        return optimizer
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, name="scaled")
    scaled.build(variables)
    scaled.gradient_norm = optimizer.gradient_norm
    return scaled


def _measure(optimizer):
    """Notes the gradient's norm where the optimizer clips it.

    On the instance: on Torch, Keras swaps in a fused optimizer for its own
    classes only, and a subclass would fall back to one op per variable.
    """
    norm = optimizer.add_variable((), dtype="float32", name="gradient_norm")
    clip = optimizer._clip_gradients

    def measured(grads):
        squares = [
            ops.sum(ops.square(ops.cast(g, "float32")))
            for g in grads
            if g is not None
        ]
        norm.assign(ops.sqrt(sum(squares)))
        return clip(grads)

    optimizer.gradient_norm = norm
    optimizer._clip_gradients = measured
