"""The tokenizer of a model folder: one SentencePiece model of all its files.

`tokenizer.model` is the vocabulary as Google trained it. Other tools leave it
out, or put tokens of their own behind it: into `tokenizer.json`, into
`added_tokens_decoder` of `tokenizer_config.json`, or into `added_tokens.json`.
"""

import json
import re
from typing import NamedTuple

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import added_tokens, tokenizer_json
from keras_gemma_ft.formats.added_tokens import SHOWN, Added, complaint
from keras_gemma_ft.formats.huggingface import is_huggingface
from keras_gemma_ft.formats.peft_config import CONFIG as ADAPTER
from keras_gemma_ft.formats.tokenizer_files import (
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    parse,
)


class Vocabulary(NamedTuple):
    """What a folder's files say.

    Attributes:
        proto: bytes of a SentencePiece model, added tokens included.
        stops: ids that end an answer, as the folder has them.
        named: {"eos_token": "<|im_end|>", ...}: what a chat template of the
            folder may call tokens.
        said: lines that a user should be told.
    """

    proto: bytes
    stops: frozenset = frozenset()
    named: dict = {}
    said: tuple = ()


def read(folder, *, template=""):
    """The tokenizer of a folder in Keras's or Hugging Face's format.

    Args:
        folder: `pathlib.Path`; an adapter's, too, where its tokens are.
        template: the source of the folder's chat template. Marks such as
            <|im_start|> that it writes are control tokens, even where the
            tool that added them did not call them special.

    Returns:
        `Vocabulary`.

    Raises:
        UserError: there is none, it is of another kind than Gemma's, or its
            files contradict each other.
    """
    if not is_huggingface(folder) and not (folder / ADAPTER).is_file():
        return _of_keras(folder)
    files = added_tokens.files(folder)
    added = added_tokens.read(files)
    if files.proto is not None:
        model = parse(files.proto)
        said = [*_agree(model, files, added)]
    elif files.whole is not None:
        texts = {token.text for token in added.values()}
        model = tokenizer_json.to_model(files.whole, texts, files.roles())
        said = [*_agree(model, files._replace(whole=None), added)]
    else:
        raise _none(folder)
    changed = _put(model, added)
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    stops, more = _stops(files, ids)
    said += [*more, *_unknown(files, ids)]
    for id in filter(changed.get, changed):
        piece = model.pieces[id]
        # A new line may end an answer, and is text all the same.
        if piece.type == USER_DEFINED and _MARK.fullmatch(piece.piece):
            if id in stops or piece.piece in template:
                piece.type = CONTROL
    proto = files.proto
    if proto is None or changed:
        proto = model.SerializeToString()
    return Vocabulary(proto, stops, files.named(), tuple(said))


# A name in brackets, such as <|im_end|> and [INST].
_MARK = re.compile(r"[<\[{|]\S*[>\]}|]")


def keep(folder, *, stops, named):
    """Writes beside a Keras preset what its vocabulary does not say.

    Args:
        folder: `pathlib.Path`.
        stops, named: as of `Vocabulary`.
    """
    told = {"eos_token_id": sorted(stops)}
    (folder / _ENDS).write_text(json.dumps(told) + "\n", "utf-8")
    (folder / _CALLED).write_text(json.dumps(named) + "\n", "utf-8")


# Of Hugging Face's format; KerasHub passes them over.
_ENDS, _CALLED = "generation_config.json", "special_tokens_map.json"


def _of_keras(folder):
    """`Vocabulary` of a Keras preset, with what `keep` has written."""
    for name in ("assets/tokenizer/vocabulary.spm", "tokenizer.model"):
        if not (folder / name).is_file():
            continue
        proto = (folder / name).read_bytes()
        if not (folder / _ENDS).is_file():
            return Vocabulary(proto)
        files = added_tokens.files(folder)._replace(config={})
        pieces = enumerate(parse(proto).pieces)
        stops, said = _stops(files, {piece.piece: id for id, piece in pieces})
        return Vocabulary(proto, stops, files.named(), tuple(said))
    raise _none(folder)


def _none(folder):
    return UserError(
        f"--preset={folder} has no tokenizer: expected tokenizer.model or "
        f"tokenizer.json (Hugging Face), or assets/tokenizer/vocabulary.spm "
        f"(Keras). Copy tokenizer.model from the original Gemma 2 repository."
    )


def _agree(model, files, added):
    """Yields what is to be said of the vocabulary and the other files.

    A piece that is no text may have another name in tokenizer.json: tools
    write <|im_start|> over one that is not used. That name is added to
    `added`, as transformers reads tokenizer.json and nothing else.

    Raises:
        UserError: they are not the same vocabulary.
    """
    names = {}
    if files.whole is not None:
        vocabulary = tokenizer_json.vocabulary(files.whole)
        names = {id: piece for piece, id in vocabulary.items()}
    wrong, renamed = [], []
    for id, piece in enumerate(model.pieces):
        name = added[id].text if id in added else names.get(id, piece.piece)
        if names and id not in names and id not in added:
            name = None
        if piece.piece in (name, _as_piece(name)):
            continue
        if (piece.piece, name) == ("<0x09>", "\t"):
            continue
        if name is None or piece.type not in (CONTROL, USER_DEFINED):
            wrong.append(f"{id}: {piece.piece!r} there, {name!r} here")
            continue
        renamed.append(f"{id} is {name!r}, not {piece.piece!r}")
        added.setdefault(id, Added(name, True, "tokenizer.json"))
    beyond = {*names} - {*range(len(model.pieces))} - {*added}
    wrong += [f"{id}: only here, {names[id]!r}" for id in sorted(beyond)]
    if wrong:
        raise UserError(
            complaint(
                "The tokenizer's files are of two vocabularies: "
                "tokenizer.model (there) and tokenizer.json or the added "
                "tokens (here)",
                wrong,
            )
        )
    if renamed:
        more = ", ..." if len(renamed) > SHOWN else ""
        yield (
            "the tokenizer's files give pieces other names than "
            f"tokenizer.model: {'; '.join(renamed[:SHOWN])}{more}; these are "
            "used, as transformers does"
        )


def _as_piece(text):
    """A text as SentencePiece has it; None of None."""
    return text and text.replace(" ", SPACE)


def _put(model, added):
    """Gives a `ModelProto` its added tokens, at their ids.

    Returns:
        ({id: whether it is a new token} of the ids that it did not have so).

    Raises:
        UserError: one has the name of another piece, or takes white space
            from the text beside it, which no SentencePiece model does.
    """
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    size, wrong, changed = len(ids), [], {}
    for id, (text, special, file, beside) in added.items():
        # White space is text, whatever a tool calls special.
        control = special and text.strip(f"{SPACE} \n\r\t")
        text = text if control else _as_piece(text)
        while len(model.pieces) <= id:
            # A row that no token has, by the name that llama.cpp gives it.
            name = f"[PAD{len(model.pieces)}]"
            model.pieces.add(piece=name, score=0.0, type=UNUSED)
        piece = model.pieces[id]
        if piece.piece == text and piece.type not in (NORMAL, UNUSED):
            continue
        if ids.get(text, id) != id:
            wrong.append(f"{file}: {id} is {text!r}, which is {ids[text]} too")
        if beside and text != "<mask>":
            wrong.append(
                f"{file}: {text!r} has {', '.join(beside)}; expected a token "
                "that leaves the text beside it alone"
            )
        changed[id] = id >= size or piece.piece != text
        kind = CONTROL if control else USER_DEFINED
        piece.piece, piece.type, piece.score = text, kind, 0.0
        ids[text] = id
    if wrong:
        raise UserError(complaint("The added tokens cannot be followed", wrong))
    model.trainer_spec.vocab_size = len(model.pieces)
    return changed


def _stops(files, ids):
    """(ids that end an answer, what is to be said of others)."""
    found, said = set(), []
    for told, file in (
        (files.generation, "generation_config.json"),
        (files.config, "config.json"),
    ):
        value = told.get("eos_token_id")
        for id in value if type(value) is list else [value]:
            if type(id) is int and 0 <= id < len(ids):
                found.add(id)
            elif id is not None:
                said.append(
                    f"{file}: eos_token_id={id!r} is no token of this "
                    f"vocabulary of {len(ids)}, and ends no answer"
                )
    texts = files.generation.get("stop_strings") or []
    for text in [texts] if type(texts) is str else texts:
        if text in ids:
            found.add(ids[text])
        else:
            said.append(
                f"generation_config.json: stop_strings={text!r} is no token, "
                "and ends no answer"
            )
    eos = files.named().get("eos_token")
    return frozenset(found | {ids[t] for t in [eos] if t in ids}), said


def _unknown(files, ids):
    """Yields a line about names that the files give, and no id for them."""
    unknown = [repr(name) for name in files.special() if name not in ids]
    if unknown:
        yield (
            "tokenizer_config.json names tokens that no file gives an id: "
            f"{', '.join(unknown[:SHOWN])}; they stay text"
        )
