"""How far two models are apart, told from their logits."""

import numpy as np

from keras_gemma_ft.config import UserError

# Mean KL divergence in nats that a way of storing weights may cost. A wrong
# tensor costs more than 1; bfloat16 costs a 2B about 1e-3; llama.cpp keeps
# keys and values in float16.
LIMITS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 2e-2}
_CODES = 0.5


def differences(ours, theirs):
    """What separates two models.

    Args:
        ours, theirs: lists of logits [T, V] of the same tokens.

    Returns:
        dict: "max_difference" of the logits, "kl" the mean KL(ours || theirs)
        in nats, "top1" the share of tokens at which both prefer the same
        word, "positions" how many tokens were compared.
    """
    most, divergence, same, count = 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        # A table may be padded with words that nobody uses.
        words = min(a.shape[-1], b.shape[-1])
        for x, y in zip(a[:, :words], b[:, :words], strict=True):
            x, y = x.astype("float64"), y.astype("float64")
            most = max(most, float(np.max(np.abs(x - y))))
            p = x - np.logaddexp.reduce(x)
            q = y - np.logaddexp.reduce(y)
            divergence += float(np.sum(np.exp(p) * (p - q)))
            same += int(np.argmax(x) == np.argmax(y))
            count += 1
    return {
        "max_difference": most,
        "kl": max(0.0, divergence / count),
        "top1": same / count,
        "positions": count,
    }


def check(what, found, kind):
    """Refuses an export that computes something else than what was trained.

    Args:
        what: the format, for the message.
        found: what `differences` gave.
        kind: how its weights are stored: a dtype, or a kind of GGUF.

    Raises:
        UserError: the files were not left behind.
    """
    limit = LIMITS.get(kind, _CODES)
    if not found["kl"] <= limit:
        raise UserError(
            f"the export as {what} did not verify and was removed: opened "
            f"again, it computes something else. Mean KL divergence "
            f"{found['kl']:.3g} nats (limit {limit:g} for {kind}), largest "
            f"difference of a logit {found['max_difference']:.3g}, top-1 "
            f"agreement {found['top1']:.1%} over {found['positions']} tokens. "
            f"--noverify writes it all the same."
        )
