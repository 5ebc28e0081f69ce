"""What other tools train beside plain LoRA, as a change of whole weights.

DoRA, adapters on the token table or the head, rows of new tokens, norms: none
of it is trained here, all of it can be merged into the base's weights. The
arithmetic is PEFT's (peft/tuners/lora/layer.py, dora.py, trainable_tokens).

Letters: D hidden_dim, V words, r rank; matrices lie as in PEFT, [out, in].
"""

import dataclasses

import numpy as np

from keras_gemma_ft.formats import names

TABLE, HEAD = "token_embedding/embeddings", "lm_head/embeddings"


@dataclasses.dataclass(frozen=True)
class WholeChange:
    """An adapter that exists merged only.

    Attributes:
        pairs: {Keras path: (lora_A [r, in], lora_B [out, r], scale)}; of the
            table A is [r, V] and B [D, r], of the head [r, D] and [V, r].
        magnitudes: {Keras path: float32 [out]} of DoRA (arXiv 2402.09353).
        biases: {Keras path of a kernel: float32 [out]}, added to what comes
            out of the projection; they cannot be merged into weights.
        tensors: {Keras path: array} that stand in the base's place.
        rows: (row numbers, float32 [n, D]) that stand in the table's, or None.
        tied: whether the head is the table as it is after the change.
        kinds: what it is made of, in words.
        base: name of the model it was trained on.
        doubts: sentences that a user should be told.
    """

    pairs: dict
    magnitudes: dict
    biases: dict
    tensors: dict
    rows: tuple | None
    tied: bool
    kinds: tuple
    base: str = ""
    doubts: tuple = ()

    @property
    def untied(self):
        """Whether the head becomes another matrix than the table."""
        changed = {*self.pairs, *self.tensors}
        table = TABLE in changed or self.rows is not None
        return not self.tied and (table or HEAD in changed)

    def merged(self, path, array, head_dim):
        """One variable of the base with the change in it.

        Args:
            path: Keras path; of the head, `array` is what the base's head is.
            array: with Keras's shape.
            head_dim: H.

        Returns:
            Array of float32, or `array` itself where nothing changes it.
        """
        if path == HEAD and self.tied:
            path = TABLE
        array = self.tensors.get(path, array)
        rows = self.rows if path == TABLE else None
        if rows is None and path not in self.pairs:
            return array
        weight = np.array(array, "float32")
        if rows is not None:
            numbers, values = rows
            weight[numbers] = values
        if path not in self.pairs:
            return weight
        a, b, scale = self.pairs[path]
        change = np.float32(scale) * (b @ a)
        if path == TABLE:
            return weight + change.T
        if path == HEAD:
            return weight + change
        name, weight = names.to_huggingface(path, weight)
        weight = weight + change
        if path in self.magnitudes:
            norm = np.linalg.norm(weight, axis=1)
            weight *= (self.magnitudes[path] / norm)[:, None]
        return names.to_keras(name, weight, head_dim=head_dim)[1]

    def backbone(self, sizes):
        """The sizes of a base after the change: a table may have more rows."""
        table = self.tensors.get(TABLE)
        if table is None:
            return sizes
        return {**sizes, "vocabulary_size": len(table)}
