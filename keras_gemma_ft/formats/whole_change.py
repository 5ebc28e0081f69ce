"""A change of whole weights: an adapter that is more than pairs A B.

`low_rank.Adapter` can be trained on. What is here can only be merged: DoRA,
whole tensors that were trained beside the pairs, tables with added words, rows
of single words, pairs of the token table or the head. It is made by
`adapters.read`, and `merging` puts it into a model's weights.

A weight is here a matrix [out, in] as Hugging Face has it (a norm is [D]), the
token table and the head [V, D].
"""

import dataclasses

import numpy as np

from keras_gemma_ft.formats.names import HEAD, TABLE

# Numbers of a product that exist at once.
_PART = 2**24


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of one weight, in the order of the attributes.

    Attributes:
        whole: takes the weight's place; None leaves it. [V', D] of a table
            may have other rows than the weight.
        pair: (down [r, in], up [out, r]): `scale * up down` is added.
        scale: of the pair.
        magnitude: DoRA's (arXiv 2402.09353, equation 5): each row is brought
            to this length, or with `axis` 0 each column; [out] or [in].
        axis: that is summed over for a length.
        rows: (indices [n], values [n, in]) that are put in; None puts none.
    """

    whole: object = None
    pair: tuple | None = None
    scale: float = 1.0
    magnitude: object = None
    axis: int = 1
    rows: tuple | None = None

    def apply(self, weight):
        """The changed weight as a float32 array of its own."""
        if self.whole is not None:
            weight = self.whole
        weight = weight.astype("float32")
        if self.pair:
            down, up = (x.astype("float32") for x in self.pair)
            size = max(1, _PART // weight.shape[1])
            for first in range(0, len(weight), size):
                part = slice(first, first + size)
                weight[part] += np.float32(self.scale) * (up[part] @ down)
        if self.magnitude is not None:
            length = np.sqrt(np.einsum(_SQUARES[self.axis], weight, weight))
            ratio = self.magnitude.astype("float32") / length
            weight *= np.expand_dims(ratio, self.axis)
        if self.rows:
            indices, values = self.rows
            weight[indices] = values
        return weight

    def equals(self, other):
        """Whether both do the same to every weight."""
        mine, theirs = (
            [x.whole, *(x.pair or (None, None)), x.magnitude,
             *(x.rows or (None, None))]
            for x in (self, other)
        )  # fmt: skip
        if self.pair and self.scale != other.scale:
            return False
        if self.magnitude is not None and self.axis != other.axis:
            return False
        return all(
            a is b or (a is not None and b is not None and np.array_equal(a, b))
            for a, b in zip(mine, theirs)
        )


_SQUARES = {1: "oi,oi->o", 0: "oi,oi->i"}


@dataclasses.dataclass(frozen=True)
class WholeChange:
    """An adapter that can be merged, and not be trained on.

    Attributes:
        changes: {Keras path: `Change`}; `names.HEAD` is the head's, which a
            base with a tied head has not.
        lent: [V', D] in place of the base's table, where a head that is the
            table begins; None: the base's table.
        follows: whether a head that is the base's table stays the table, with
            all that becomes of that.
        biases: {(layer, target): [out]}, added to a projection's output, for
            which Gemma 2 has no weights.
        kinds: what makes it more than pairs, in words.
        base: name of the model that it was trained on, where it is said.
        doubts: sentences: what cannot be known of how it was trained.
    """

    changes: dict
    lent: object = None
    follows: bool = True
    biases: dict = dataclasses.field(default_factory=dict)
    kinds: tuple = ()
    base: str = ""
    doubts: tuple = ()

    @property
    def words(self):
        """Rows of the table afterwards; None: as many as the base has."""
        for path in (TABLE, HEAD):
            change = self.changes.get(path)
            if change is not None and change.whole is not None:
                return len(change.whole)
        return None if self.lent is None else len(self.lent)
