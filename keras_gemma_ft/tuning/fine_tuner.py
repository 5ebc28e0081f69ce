"""`FineTuner`: `GemmaCausalLM` as the model that Keras's `fit` trains.

One `compute_loss` serves Keras's own train step on every backend.
"""

import math

import keras
from keras import ops

from keras_gemma_ft.model import forward, hosts, tables
from keras_gemma_ft.tuning import feed, finite, objectives


class FineTuner(keras.Model):
    """`GemmaCausalLM` seen as what `fit` wants: batch in, loss out.

    Args:
        causal_lm: with LoRA on, or with every weight trainable.
        objective: a function such as `objectives.sft`.
        accumulation: micro-batches an optimizer step.
        recompute: recompute each decoder block in the backward pass.
        scan: on JAX, compile one loop over the decoder blocks.
        blocks: on Torch, `compiled.Blocks` of the decoder, or None.
        chunk: tokens whose logits exist at once; 0 picks by memory.
        seed: of dropout.
    """

    def __init__(
        self,
        causal_lm,
        objective=objectives.sft,
        *,
        accumulation=1,
        recompute=False,
        scan=False,
        blocks=None,
        chunk=0,
        seed=0,
    ):
        # The forward pass casts for itself: float32 adapters must not be
        # rounded on reading.
        super().__init__(autocast=False)
        self.causal_lm = causal_lm
        self.objective = objective
        self.accumulation = accumulation
        self.recompute, self.scan, self.chunk = recompute, scan, chunk
        self.blocks = blocks
        settings = getattr(causal_lm.backbone, "lora", None)
        dropout = settings.dropout if settings else 0.0
        self.dropout = (
            keras.random.SeedGenerator(seed, name="dropout")
            if dropout
            else None
        )
        self.layers_named = finite.layers(causal_lm.backbone)
        self.not_finite = finite.record(self.layers_named)
        self.step, self.last_loss, self.stopped = 0, 0.0, None
        self.meter = feed.Meter()
        self.meter.blocks = blocks

    @property
    def backbone(self):
        return self.causal_lm.backbone

    @property
    def states(self):
        """What else changes in a step, for a checkpoint: counts and seeds."""
        seeds = [self.dropout.state] if self.dropout else []
        return [self.not_finite, *seeds]

    def overflows(self):
        """`finite.Record` of all passes so far, read from the device."""
        return finite.Record(
            self.layers_named, self.not_finite, self.optimizer.not_finite
        )

    def _note(self, fine):
        bad = finite.blocks(fine)
        self.not_finite.assign(
            finite.counted(self.not_finite.value, bad, finite.FORWARD)
        )

    def trainable_count(self):
        """Numbers that are trained."""
        return sum(math.prod(v.shape) for v in self.trainable_variables)

    def learning_rate(self, step):
        """The learning rate of optimizer step `step`, counted from 0."""
        schedule = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        value = schedule._learning_rate(step * self.accumulation)
        return float(ops.convert_to_numpy(value))

    def call(self, x, training=False):
        """Batch x -> hidden states [B, T, d]; never logits."""
        seed = self.dropout.next() if training and self.dropout else None
        return forward.hidden_states(
            self.backbone,
            x["token_ids"],
            x["segment_ids"],
            x["positions"],
            recompute=self.recompute and training,
            scan=self.scan,
            blocks=self.blocks,
            seed=seed,
            finite=self._note if training else None,
        )

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The objective's scalar; see `pipeline` for the normalisation."""
        return self.objective(
            self.backbone,
            y_pred,
            ops.convert_to_tensor(y),
            ops.convert_to_tensor(sample_weight),
            chunk=self.chunk,
            table_trained=training and tables.trained(self.backbone),
            training=training,
            compiled=self.blocks is not None,
        )

    def train_step(self, *args):
        """Keras's; its batch, the last argument, is noted."""
        self.meter.note("train", args[-1])
        return super().train_step(*args)

    def test_step(self, *args):
        """Keras's; its batch, the last argument, is noted."""
        self.meter.note("test", args[-1])
        return super().test_step(*args)

    def make_train_function(self, force=False):
        feed.make_function(self, "train", super().make_train_function, force)

    def make_test_function(self, force=False):
        feed.make_function(self, "test", super().make_test_function, force)

    def held_out_loss(self, batches, steps):
        """Mean loss of all learned tokens of `pipeline.eval_batches`."""
        logs = self.evaluate(
            feed.Feed(batches, self.meter),
            steps=steps,
            verbose=0,
            return_dict=True,
        )
        return hosts.total(float(logs["loss"]))
