"""What a run minimises: one function for each method."""

from keras import ops

from keras_gemma_ft.model import tables
from keras_gemma_ft.tuning import loss


def sft(
    backbone,
    hidden,
    y,
    sample_weight,
    *,
    chunk,
    table_trained,
    training=True,
    compiled=False,
):
    """Token-weighted cross-entropy (supervised fine-tuning).

    Args:
        backbone: gives the head's table and the logits' soft cap.
        hidden: [B, T, d] final hidden states.
        y: int [B, T], the next tokens.
        sample_weight: float32 [B, T]; the pipeline has normalised it, so that
            the mean over an optimizer step's micro-batches is the token mean.
        chunk: tokens whose logits exist at once; 0 picks by memory.
        table_trained: whether the table needs a gradient.
        training: whether anything needs a gradient.
        compiled: on Torch, whether the head is compiled as the blocks are.

    Returns:
        float32 scalar.
    """
    losses = loss.token_loss(
        hidden,
        tables.head(backbone),
        y,
        sample_weight,
        cap=backbone.final_logit_soft_cap,
        chunk=chunk,
        table_trained=table_trained,
        training=training,
        compiled=compiled,
    )
    return ops.sum(losses * ops.cast(sample_weight, "float32"))
