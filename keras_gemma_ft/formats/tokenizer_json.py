"""`tokenizer.json` of the `tokenizers` library -> a SentencePiece model.

Gemma's is BPE with a vocabulary and merges. SentencePiece knows scores alone,
and joins the neighbours whose joined text is a piece, the best score first:
the same as merges, if each piece scores by the first merge that makes it and
every way to make it is a merge. Both are checked here, for all pieces, so that
what is read gives the ids that `tokenizers` gives.
"""

import itertools

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats.tokenizer_files import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
)

_BYTES = [f"<0x{value:02X}>" for value in range(256)]
# Offenders shown of each kind.
_SHOWN = 5


def vocabulary(told):
    """{piece: id} of a parsed `tokenizer.json`, added tokens included.

    Gemma's first files called the piece <0x09> "\\t"; here it is <0x09>.

    Args:
        told: dict.

    Raises:
        UserError: it has none.
    """
    model = told.get("model")
    found = model.get("vocab") if type(model) is dict else None
    if type(found) is not dict or not found:
        raise UserError(
            "tokenizer.json has no vocabulary of pieces and ids, expected "
            "Gemma's BPE." + _CURE
        )
    wrong = [
        f"{piece!r}: {id!r}"
        for piece, id in found.items()
        if type(id) is not int or id < 0
    ]
    if wrong:
        raise UserError(
            f"tokenizer.json has ids that are none: {_some(wrong)}." + _CURE
        )
    tab = found.get("\t")
    if _BYTES[9] not in found and tab is not None:
        if tab - 1 == found.get(_BYTES[8]):
            found = {**found, _BYTES[9]: tab}
            del found["\t"]
    return found


_CURE = (
    " Copy tokenizer.model from the original Gemma 2 repository into the "
    "folder, or save the tokenizer again with transformers."
)


def to_model(told, added, named):
    """A parsed `tokenizer.json` as a SentencePiece `ModelProto`.

    Args:
        told: dict, the parsed file.
        added: set of the pieces that are added tokens: they are found in a
            text before anything else, and take part in no merge.
        named: {"bos": piece, "eos": ..., "pad": ...}, those that are known.

    Returns:
        A `ModelProto` of the pieces of `model.vocab`, at their ids. Added
        tokens are NORMAL pieces in it; who calls gives them their types.

    Raises:
        UserError: it is of another kind; what was found is listed.
    """
    found = vocabulary(told)
    wrong = [*_complaints(told, found)]
    if wrong:
        raise UserError(
            "tokenizer.json is not of Gemma's kind:\n  "
            + "\n  ".join(wrong)
            + "\nExpected BPE with byte pieces over a text whose spaces are "
            f"{SPACE}." + _CURE
        )
    pairs = [*map(_pair, told["model"]["merges"])]
    plain = found.keys() - added - set(_BYTES)
    scores = _scores(pairs, plain)
    return _build(told, found, scores, named)


def _complaints(told, vocab):
    """What is not as in Gemma's file, one line each."""
    model = told["model"]
    # Files of before 2022 name no type.
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        yield f"model: type={kind!r}, expected 'BPE'"
    if model.get("byte_fallback") is not True:
        yield f"model: byte_fallback={model.get('byte_fallback')!r}"
    for name in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "ignore_merges",
    ):
        if model.get(name):
            yield f"model: {name}={model[name]!r}"
    missing = [name for name in _BYTES if name not in vocab]
    if missing:
        yield f"model: no pieces {_some(missing)}"
    if sorted(vocab.values()) != list(range(len(vocab))):
        yield f"model: the ids of {len(vocab)} pieces are not 0, 1, 2, ..."
    if model.get("unk_token", "<unk>") not in vocab:
        yield f"model: unk_token={model.get('unk_token')!r} is no piece"
    pairs = model.get("merges")
    if type(pairs) is not list or not all(map(_pair, pairs)):
        yield "model: merges are no list of pairs"
    else:
        made = {"".join(_pair(merge)) for merge in pairs}
        # Tabs, in Gemma's first files: see `vocabulary`.
        if none := sorted(made - vocab.keys() - {"\t"}):
            yield f"model: merges that make no piece: {_some([*map(repr, none)])}"
    if not _is_spaces(told.get("normalizer")):
        yield f"normalizer: {_short(told.get('normalizer'))}"
    if not _is_idle(told.get("pre_tokenizer")):
        yield f"pre_tokenizer: {_short(told['pre_tokenizer'])}"


def _short(part):
    """A part of the file, in so many words."""
    return f"{part!r:.200}"


def _some(what):
    rest = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
    return ", ".join(what[:_SHOWN]) + rest


def _pair(merge):
    """A merge, "left right" or [left, right], as a pair; None if it is none."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if type(parts) is not list or [*map(type, parts)] != [str, str]:
        return None
    return tuple(parts)


def _is_spaces(normalizer):
    """Whether it writes each space as the block, and does nothing else."""
    if type(normalizer) is dict and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers")
        normalizer = parts[0] if type(parts) is list and len(parts) == 1 else 0
    return normalizer == {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": SPACE,
    }


def _is_idle(pre_tokenizer):
    """Whether it cuts nowhere: at spaces, of which none is left by then."""
    if pre_tokenizer is None:
        return True
    told = type(pre_tokenizer) is dict and {**pre_tokenizer, "behavior": ""}
    return told == {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "",
        "invert": False,
    }


def _scores(pairs, plain):
    """{piece: score} of the pieces that merges make, the first one's 0.

    Args:
        pairs: the merges, in their order.
        plain: set of the pieces that take part in them.

    Raises:
        UserError: no scores do what the merges do.
    """
    first, last = {}, {}
    known = set()
    for rank, (left, right) in enumerate(pairs):
        piece = left + right
        if left in plain and right in plain and piece in plain:
            first.setdefault(piece, rank)
            last[piece] = rank
            known.add((left, right))
    # In a run of one character every order comes to the same end.
    order = [piece for piece in first if len({*piece}) > 1]
    mixed = [
        f"{piece!r} and {after!r}"
        for piece, after in itertools.pairwise(order)
        if last[piece] > first[after]
    ]
    missing = [
        f"{piece[:i]!r} {piece[i:]!r}"
        for piece in plain
        for i in range(1, len(piece))
        if piece[:i] in plain
        and piece[i:] in plain
        and (piece[:i], piece[i:]) not in known
    ]
    if mixed or missing:
        told = [f"merges that are not in order: {_some(mixed)}"] * bool(mixed)
        told += [f"merges that are missing: {_some(missing)}"] * bool(missing)
        raise UserError(
            "tokenizer.json joins pieces as no SentencePiece model does: "
            f"{'; '.join(told)}. It was not made from one, as Gemma's is."
            + _CURE
        )
    return {piece: -float(number) for number, piece in enumerate(first)}


def _build(told, vocab, scores, named):
    """The `ModelProto` of checked parts."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    spec, normal = model.trainer_spec, model.normalizer_spec
    unknown = told["model"].get("unk_token", "<unk>")
    special = {named[role]: role for role in named if named[role] in vocab}
    spec.model_type, spec.byte_fallback = BPE, True
    spec.vocab_size = len(vocab)
    for role in ("pad", "eos", "bos"):
        setattr(spec, f"{role}_id", -1)
    for piece, role in [*special.items(), (unknown, "unk")]:
        setattr(spec, f"{role}_id", vocab[piece])
        setattr(spec, f"{role}_piece", piece)
    normal.name = "identity"
    normal.add_dummy_prefix = normal.remove_extra_whitespaces = False
    kinds = dict.fromkeys(_BYTES, BYTE) | dict.fromkeys(special, CONTROL)
    kinds[unknown] = UNKNOWN
    # Single characters, which no merge makes, after all others, as trained.
    rest = itertools.count(len(scores))
    for piece in sorted(vocab, key=vocab.get):
        kind, score = kinds.get(piece, NORMAL), 0.0
        if kind == NORMAL:
            score = scores.get(piece)
            score = -float(next(rest)) if score is None else score
        model.pieces.add(piece=piece, score=score, type=kind)
    return model
