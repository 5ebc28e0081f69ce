"""Frozen kernels as they are stored, and as a matmul wants them."""

from keras import ops


def kernel(dense, dtype):
    """The frozen kernel of an EinsumDense, in `dtype`.

    Not `dense.kernel`, which adds A B to it when LoRA is on.
    """
    return ops.cast(dense._kernel, dtype)


def embedding(backbone):
    """The token table [V, d], in its own dtype; never quantised."""
    return backbone.token_embedding.embeddings
