"""What the model is taught, shown: the first example of a batch, in words."""

import collections

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data.segments import BOS, END, EOS

# Around what is learned.
MARKS = ("⟦", "⟧")


def proof(batch, tokenizer, *, marks=MARKS):
    """The first example of a batch and what of it is learned.

    A control token is written by its name. The same characters as text, which
    are a dozen ordinary tokens and end nothing, are written [typed <name>].

    Args:
        batch: `(x, y, sample_weight)`.
        tokenizer: `tokens.Tokenizer`.
        marks: what stands before and after each learned part.

    Returns:
        Text of several lines.
    """
    x, y, weight = batch
    here = x["segment_ids"][0] == 1
    ids = [int(x["token_ids"][0][here][0]), *map(int, y[0][here])]
    learned = [False, *(weight[0][here] > 0)]
    text, start, typed = "", 0, 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or learned[i] != learned[start]:
            run, count = _words(ids[start:i], tokenizer)
            text += f"{marks[0]}{run}{marks[1]}" if learned[start] else run
            start, typed = i, typed + count
    used = x["segment_ids"] > 0
    told = [f"{BOS}: {ids.count(tokenizer.bos)}"]
    ends = [tokenizer.name(id) for id in sorted(tokenizer.stops)]
    # A vocabulary's further ends, such as <|im_end|>.
    names = dict.fromkeys([END, EOS, *ends])
    told += [_count(name, ids, learned, tokenizer) for name in names]
    told += [f"names of control tokens typed as text: {typed}"]
    return (
        f"{text}\n{'; '.join(told)}; "
        f"batch: {(weight > 0).sum() / max(used.sum(), 1):.1%} of the tokens "
        f"learned, {1 - used.mean():.1%} padding"
    )


def _words(ids, tokenizer):
    """`(text, how many names of control tokens are typed in it)`."""
    text, typed = "", 0
    for control, run in _runs(ids, tokenizer):
        if control:
            text += "".join(
                tokenizer.decode([i], skip_control=False) for i in run
            )
        else:
            shown, count = tokenizer.control.subn(
                lambda match: f"[typed {match[0]}]", tokenizer.decode(run)
            )
            text, typed = text + shown, typed + count
    return text, typed


def _runs(ids, tokenizer):
    """Yields (whether they are control tokens, neighbouring ids)."""
    run, kind = [], False
    for i in ids:
        if tokenizer.is_control(i) != kind and run:
            yield kind, run
            run = []
        kind = tokenizer.is_control(i)
        run.append(i)
    if run:
        yield kind, run


def _count(name, ids, learned, tokenizer):
    """How often a control token is there, such as "<eos>: 2, 1 learned"."""
    try:
        own = tokenizer.id(name)
    except UserError:
        return f"{name}: not in this vocabulary"
    found = collections.Counter(
        bool(is_learned) for i, is_learned in zip(ids, learned) if i == own
    )
    return f"{name}: {found.total()}, {found[True]} learned"
