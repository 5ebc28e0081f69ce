"""Gemma 2 in NumPy, a block of weights in memory at a time.

It is written from the paper and from transformers' modeling_gemma2.py, shares
no code with the models that are trained, and needs no backend: it tells what
the bytes of a file compute, on a machine that could not hold the model.

Shapes: T tokens, D hidden, n query heads, k key/value heads, g = n/k, H
head_dim, F feed-forward width, V words.
"""

import numpy as np

from keras_gemma_ft.formats.huggingface import query_scalar
from keras_gemma_ft.formats.names import HEAD, TABLE

_EPSILON = 1e-6
# Words of the table that are multiplied at once: 75 MB of 2B in float32.
_WORDS = 2**13


def logits(model, sequences, *, dtype="float32"):
    """Soft-capped logits of every token of some sequences.

    Args:
        model: a reader; see `formats/models.py`. Each of its variables is
            read once, or the table twice.
        sequences: lists of token ids.
        dtype: "float32", or "float64" to judge others by.

    Returns:
        List of arrays [T, V], one for each sequence.
    """
    sizes = model.backbone
    table = model.read(TABLE)
    root = np.sqrt(sizes["hidden_dim"]).astype(dtype)
    streams = [table[np.asarray(ids)].astype(dtype) * root for ids in sequences]
    del table
    for i in range(sizes["num_layers"]):
        weights = _Block(model, i, dtype)
        streams = [_block(x, weights, sizes, i) for x in streams]
    scale = model.read("final_normalization/scale").astype(dtype)
    return _head(model, [_norm(x, scale) for x in streams], dtype)


def _head(model, hidden, dtype):
    """[T, V] of each hidden [T, D], through the table or a head of its own."""
    table = model.read(HEAD if HEAD in model.paths else TABLE)
    lengths = np.cumsum([len(x) for x in hidden])[:-1]
    together = np.concatenate(hidden)
    parts = [
        together @ table[at : at + _WORDS].astype(dtype).T
        for at in range(0, len(table), _WORDS)
    ]
    found = _cap(
        np.concatenate(parts, -1), model.backbone["final_logit_soft_cap"]
    )
    return np.split(found, lengths)


class _Block:
    """The variables of one decoder block, in `dtype`, read when asked for."""

    def __init__(self, model, number, dtype):
        self.model, self.dtype = model, dtype
        self.prefix = f"decoder_block_{number}/"
        self.held = {}

    def __getitem__(self, name):
        if name not in self.held:
            array = self.model.read(self.prefix + name)
            self.held[name] = array.astype(self.dtype)
        return self.held[name]


def _block(x, weights, sizes, number):
    y = _norm(x, weights["pre_attention_norm/scale"])
    y = _attention(y, weights, sizes, number)
    x = x + _norm(y, weights["post_attention_norm/scale"])
    y = _norm(x, weights["pre_ffw_norm/scale"])
    gate = _gelu(y @ weights["ffw_gating/kernel"])
    y = (gate * (y @ weights["ffw_gating_2/kernel"])) @ weights[
        "ffw_linear/kernel"
    ]
    return x + _norm(y, weights["post_ffw_norm/scale"])


def _attention(x, weights, sizes, number):
    """Causal attention [T, D]; a window in every other block, from the first."""
    q = np.einsum("td,ndh->nth", x, weights["attention/query/kernel"])
    k = np.einsum("td,kdh->kth", x, weights["attention/key/kernel"])
    v = np.einsum("td,kdh->kth", x, weights["attention/value/kernel"])
    q, k = _rotate(q), _rotate(k)
    group = len(q) // len(k)
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scale = x.dtype.type(query_scalar(sizes) ** -0.5)
    scores = _cap(q @ k.transpose(0, 2, 1) * scale,
                  sizes["attention_logit_soft_cap"])  # fmt: skip
    far = np.arange(len(x))[:, None] - np.arange(len(x))
    seen = far >= 0
    if number % 2 == 0 and sizes["use_sliding_window_attention"]:
        seen &= far < sizes["sliding_window_size"]
    scores = np.where(seen, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = scores @ v  # [n, T, H]
    return np.einsum(
        "nth,nhd->td", out, weights["attention/attention_output/kernel"]
    )


def _rotate(x):
    """Rotary embedding of [heads, T, H] (arXiv 2104.09864), halves apart."""
    half = x.shape[-1] // 2
    wavelength = 10_000.0 ** (np.arange(half, dtype="float64") / half)
    angle = np.arange(x.shape[1], dtype="float64")[:, None] / wavelength
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], -1
    )


def _norm(x, scale):
    """RMSNorm (arXiv 1910.07467) times 1 + scale."""
    mean = np.mean(np.square(x), -1, keepdims=True)
    return x / np.sqrt(mean + x.dtype.type(_EPSILON)) * (1 + scale)


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _gelu(x):
    """GELU by its tanh form (arXiv 1606.08415)."""
    root = x.dtype.type(np.sqrt(2 / np.pi))
    return x / 2 * (1 + np.tanh(root * (x + x.dtype.type(0.044715) * x**3)))
