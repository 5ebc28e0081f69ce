"""Hands batches to `fit` on each backend, and measures the wait for them.

Batches differ in T, their tokens a row. Keras's own data adapters read T off
the first two batches and take every later batch to be like them. TensorFlow
would trace its function with an unknown T as soon as a second length comes,
and the forward pass needs T as a number.
"""

import collections
import time

import keras

# Not public; but `get_data_adapter` lets a custom one pass on purpose.
from keras.src.trainers.data_adapters.data_adapter import DataAdapter


class Meter:
    """What is noted of the batches.

    Attributes:
        seconds: how long the training loop has waited for them. On JAX the
            loop runs ahead of the device, which may be busy meanwhile: there
            it is the most that the device can have waited.
        traces: {(kind, (rows, tokens)): count}: how often a "train" or "test"
            step was traced for a shape, which is once a compilation. Torch
            traces every step.
        blocks: on Torch, `compiled.Blocks`, which count for themselves.
    """

    def __init__(self):
        self.seconds, self.traces = 0.0, collections.Counter()
        self.blocks = None

    def note(self, kind, data):
        """Notes that a step on `data` is traced."""
        self.traces[kind, tuple(data[1].shape)] += 1

    def compilations(self, kind):
        """{(rows, tokens): compilations} of a kind of step, smallest first.

        On Torch they are the decoder block's, of both kinds of step; without
        them each shape counts once.
        """
        found = {
            shape: count
            for (name, shape), count in sorted(self.traces.items())
            if name == kind
        }
        if keras.config.backend() == "torch":
            own = self.blocks.compilations if self.blocks else {}
            found = {shape: own.get(shape, 1) for shape in found}
        return found


class Feed(DataAdapter):
    """Batches for `fit` and `evaluate`, as numpy arrays, and timed.

    The training loop of every backend calls this iterator from its own thread,
    so the time that is spent in here is the time that the loop waits. There is
    no tf.data in between: its `next` takes 1.2 ms a batch, this one 0.1 ms.

    Args:
        batches: iterable of `(x, y, sample_weight)`, such as a
            `grain.IterDataset` of `pipeline`.
        meter: `Meter`.
    """

    num_batches = batch_size = has_partial_batch = partial_batch_size = None

    def __init__(self, batches, meter):
        self.batches, self.meter = batches, meter

    def __iter__(self):
        iterator, end = iter(self.batches), object()
        while True:
            begin = time.perf_counter()
            batch = next(iterator, end)
            self.meter.seconds += time.perf_counter() - begin
            if batch is end:
                return
            yield batch

    def get_numpy_iterator(self):
        return self

    get_jax_iterator = get_tf_dataset = get_numpy_iterator
    get_torch_dataloader = get_numpy_iterator


def make_function(model, kind, make, force):
    """Makes `model.train_function`; on TensorFlow, one for each shape.

    Args:
        model: a `keras.Model`.
        kind: "train" or "test".
        make: Keras's own `make_train_function` of the model.
        force: as there: make it although it is there.
    """
    name = f"{kind}_function"
    if keras.config.backend() != "tensorflow":
        make(force)
        return
    if getattr(model, name) is not None and not force:
        return
    functions = {}

    def function(iterator):
        data = next(iterator)
        shape = tuple(data[1].shape)
        if shape not in functions:
            make(force=True)
            functions[shape] = getattr(model, name)
            setattr(model, name, function)
        return functions[shape](iter((data,)))

    setattr(model, name, function)
