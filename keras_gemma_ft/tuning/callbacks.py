"""Keras callbacks that log, evaluate, save checkpoints and stop the run.

What Keras calls an epoch is a window of `--train.log_every` optimizer steps
here. At its end the values are back in the variables on every backend, and the
loss metric is the exact mean over the window. An evaluation or a checkpoint
that is due within a window happens at its end.
"""

import math
import sys
import time

import keras
from keras import ops
from safetensors import numpy as safetensors
from tqdm import auto

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import atomic
from keras_gemma_ft.model import hosts
from keras_gemma_ft.tuning import checkpoint, finite


class Clock(keras.callbacks.Callback):
    """Counts the steps, shows the bar, writes a metrics line per window.

    Must be the first callback: `tuner.step` is what the others read.

    Args:
        folder: `RunFolder`.
        tokens: function of a step: (row tokens, learned tokens) up to it.
        steps: optimizer steps of the whole run.
        start: the step from which this process goes on.
    """

    # Keras calls it from another thread, without waiting for the device. There
    # `self.model` must not be read: on JAX that fetches the state, whose memory
    # the running step has been given.
    async_safe = True

    def __init__(self, folder, tokens, *, steps, start):
        super().__init__()
        self.folder, self.tokens, self.steps = folder, tokens, steps
        self.seconds, self.waited, self.losses = 0.0, 0.0, []
        self.row_tokens = 0
        self.bar = auto.tqdm(
            total=steps,
            initial=start,
            desc="training",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            disable=not hosts.first(),
        )

    def on_train_begin(self, logs=None):
        self.accumulation = self.model.accumulation
        self.meter = self.model.meter

    def on_epoch_begin(self, epoch, logs=None):
        self.begin = time.perf_counter()
        self.waited_before = self.meter.seconds

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.accumulation == 0:
            self.bar.update(1)

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        seconds = time.perf_counter() - self.begin
        waited = self.meter.seconds - self.waited_before
        before = model.step
        model.step += self.params["steps"] // model.accumulation
        rows, learned = self.tokens(model.step)
        done = rows - self.tokens(before)[0]
        self.seconds += seconds
        self.waited += waited
        self.row_tokens += done
        optimizer = model.optimizer
        # For the callbacks after this one too.
        logs["loss"] = hosts.total(float(logs["loss"]))
        line = {
            "step": model.step,
            "tokens": learned,
            "loss": logs["loss"],
            "grad_norm": float(
                ops.convert_to_numpy(optimizer.gradient_norm.value)
            ),
            "learning_rate": model.learning_rate(model.step - 1),
            "tokens_per_s": round(done / seconds, 1),
            "input_wait": round(waited / seconds, 5),
        }
        scale = _loss_scale(optimizer)
        if scale is not None:
            line["loss_scale"] = scale
            line["overflows"] = model.overflows().counts()
        self.losses.append(line["loss"])
        self.folder.append(line)
        self.bar.set_postfix_str(
            f"loss {line['loss']:.4f}, {line['tokens_per_s']:.0f} tokens/s"
        )

    def on_train_end(self, logs=None):
        self.bar.refresh()


class Evaluate(keras.callbacks.Callback):
    """Evaluates on held-out rows, keeps the best values, and may stop the run.

    Args:
        folder: `RunFolder`.
        batches: normalised held-out batches.
        count: how many they are.
        every: steps between evaluations; the last step always counts.
        steps: optimizer steps of the whole run.
        patience: evaluations without a better one before stopping; 0: never.
        best: {"step", "eval_loss", "worse"} of a run that is continued.
    """

    def __init__(self, folder, batches, count, *, every, steps, patience, best):
        super().__init__()
        self.folder, self.batches, self.count = folder, batches, count
        self.every, self.steps, self.patience = every, steps, patience
        self.best = best or {"step": 0, "eval_loss": math.inf, "worse": 0}
        self.due = None

    def on_epoch_end(self, epoch, logs=None):
        step = self.model.step
        if self.due is None:
            self.due = _next(step - 1, self.every)
        if step < self.due and step < self.steps:
            return
        self.due = _next(step, self.every)
        loss = self.model.held_out_loss(self.batches, self.count)
        # All processes decide by the number of process 0, to the last bit.
        loss = hosts.gather(loss)[0]
        line = {"step": step, "eval_loss": loss}
        line["perplexity"] = math.exp(min(loss, 700.0))
        self.folder.append(line)
        if loss < self.best["eval_loss"]:
            self.best = {"step": step, "eval_loss": loss, "worse": 0}
            save_best(self.folder, self.model, self.best)
        else:
            self.best = {**self.best, "worse": self.best["worse"] + 1}
            if 0 < self.patience <= self.best["worse"]:
                runtime.say(
                    f"no better held-out loss in {self.patience} evaluations; "
                    f"stopping at step {step}"
                )
                self.model.stop_training = True


class Checkpoint(keras.callbacks.Callback):
    """Saves a checkpoint when one is due, on a signal, and when time is up.

    The last step is always saved.

    Args:
        folder: `RunFolder`.
        every: steps between checkpoints; 0 is only the last.
        steps: optimizer steps of the whole run.
        keep: complete checkpoints that stay.
        deadline: `time.monotonic()` at which to stop, or None.
        facts: function that gives what is saved besides the step.
    """

    def __init__(self, folder, *, every, steps, keep, deadline, facts):
        super().__init__()
        self.folder, self.every, self.steps = folder, every, steps
        self.keep, self.deadline, self.facts = keep, deadline, facts
        self.terminated = None  # the name of the signal that came
        self.due = None

    def on_epoch_end(self, epoch, logs=None):
        step = self.model.step
        if self.due is None:
            self.due = _next(step - 1, self.every)
        late = self.deadline is not None and time.monotonic() > self.deadline
        # A signal may come to one process only, and clocks differ.
        reason = self.terminated or ("time is up" if late else "")
        stop = next(filter(None, hosts.gather(reason)), "")
        last = step >= self.steps or self.model.stop_training
        if step >= self.due or stop or last:
            self.due = _next(step, self.every)
            self.save()
        if stop and not last:
            self.model.stop_training = True
            self.model.stopped = stop

    def save(self):
        if not math.isfinite(self.model.last_loss):
            return
        checkpoint.save(
            self.folder.path,
            self.model,
            {"step": self.model.step, **self.facts()},
        )
        checkpoint.prune(self.folder.path, self.keep)


class StopOnNaN(keras.callbacks.Callback):
    """Stops the run without a checkpoint if loss or gradient is not finite.

    In float16 one such pass is harmless: it is left out, and the loss scale is
    halved. If that happens again and again, the run is stopped too.
    """

    def on_epoch_end(self, epoch, logs=None):
        loss = float(logs["loss"])
        # The loss is of before the update: the gradient tells whether the
        # window's last one has spoilt the values that would be saved.
        norm = float(
            ops.convert_to_numpy(self.model.optimizer.gradient_norm.value)
        )
        scale = _loss_scale(self.model.optimizer)
        loss, norm, scale = hosts.gather([loss, norm, scale])[0]
        why = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            why = "the loss or its gradient is not finite"
        elif scale is not None and scale < finite.LEAST_SCALE:
            why = f"the loss scale has fallen to {scale:g}"
        if not why:
            self.model.last_loss = loss
            return
        self.model.last_loss = math.nan
        self.model.stop_training = True
        self.model.stopped = why


def _loss_scale(optimizer):
    """By which a loss in float16 is multiplied; None in other dtypes."""
    found = getattr(optimizer, "dynamic_scale", None)
    return found if found is None else float(ops.convert_to_numpy(found.value))


def _next(step, every):
    """The first multiple of `every` after `step`; never for 0."""
    return (step // every + 1) * every if every else math.inf


def save_best(folder, tuner, best):
    """best.safetensors: the trained values with the lowest held-out loss."""
    arrays = {v.path: hosts.whole(v.value) for v in tuner.trainable_variables}
    if not hosts.first():
        return
    facts = {key: str(value) for key, value in best.items()}
    # Not save_file: its files are for the owner's eyes only.
    data = safetensors.save(arrays, metadata=facts)
    with atomic.replacing(folder.path / "best.safetensors", len(data)) as path:
        path.write_bytes(data)


def load_best(folder, tuner):
    """Puts best.safetensors into the tuner's variables."""
    arrays = checkpoint.load(folder.path / "best.safetensors")
    for variable in tuner.trainable_variables:
        variable.assign(arrays[variable.path])
