"""A SentencePiece vocabulary as the files that transformers reads.

`tokenizer.json` is the format of the `tokenizers` library: BPE as a vocabulary
and a list of merges. SentencePiece keeps no merges: it joins the neighbours
whose joined text is a piece, the best score first. So each way to split a
piece in two pieces is a merge, in the order of the pieces' scores
(transformers/convert_slow_tokenizer.py, `generate_merges`).
"""

import json
import pathlib

from keras_gemma_ft.config import UserError

# What SentencePiece writes for a space.
SPACE = "\u2581"
# Kinds of pieces in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
# Pieces of Gemma's vocabularies that are user-defined and yet end or begin a
# turn: transformers takes them for special tokens, which decoding leaves out.
_TURNS = ("<start_of_turn>", "<end_of_turn>")
# What transformers calls the pieces that a model's settings name.
_ROLES = ("pad", "eos", "bos", "unk")


def parse(proto):
    """Bytes of a SentencePiece model -> its `ModelProto`.

    Raises:
        UserError: they are none.
    """
    # The verbs that need no text should not pay for these.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(proto)
    except DecodeError as error:
        raise UserError(
            f"The vocabulary ({len(proto)} bytes) is no SentencePiece "
            "model. Is vocabulary.spm or tokenizer.model complete?"
        ) from error
    return model


def write_tokenizer(folder, proto, *, chat_template, named=None):
    """Writes the tokenizer's files of a model in Hugging Face's format.

    They are `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json`,
    `special_tokens_map.json` and `chat_template.jinja`; the template stands in
    `tokenizer_config.json`, too, for readers of before 2025.

    Args:
        folder: where to; it is there already.
        proto: bytes of a SentencePiece BPE model.
        chat_template: Jinja source; see `data.chat_template.of`.
        named: {"eos_token": "<|im_end|>", ...}: what the template calls
            tokens, where the vocabulary's own settings name others.

    Raises:
        UserError: `proto` is no such model.
    """
    folder, model = pathlib.Path(folder), parse(proto)
    whole = tokenizer_json(model)
    own = {f"{role}_token": piece for role, piece in _named(model).items()}
    named = {**own, **(named or {})}
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **named,
        "additional_special_tokens": [
            piece.piece for piece in model.pieces if piece.piece in _TURNS
        ],
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "sp_model_kwargs": {},
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in whole["added_tokens"]
        },
        "chat_template": chat_template,
    }
    (folder / "tokenizer.model").write_bytes(proto)
    _write(folder / "tokenizer.json", whole)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(chat_template, "utf-8")


def _write(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", "utf-8")


def _named(model):
    """{"bos": piece, ...} of the pieces that the model's settings name."""
    spec, pieces = model.trainer_spec, model.pieces
    ids = {role: getattr(spec, f"{role}_id") for role in _ROLES}
    return {
        role: pieces[id].piece
        for role, id in ids.items()
        if 0 <= id < len(pieces)
    }


def tokenizer_json(model):
    """What `tokenizer.json` holds, of a SentencePiece `ModelProto`.

    Raises:
        UserError: it is no BPE with byte pieces, or changes texts in ways
            that Gemma's does not.
    """
    _check(model)
    named = _named(model)
    special = {*named.values(), *_TURNS}
    texts = [*map(_text, model.pieces)]
    added = [
        {
            "id": id,
            "content": texts[id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type == CONTROL or piece.piece in special,
        }
        for id, piece in enumerate(model.pieces)
        if piece.type in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    space = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": space, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": space,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _bos_first(named["bos"], model.trainer_spec.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {
                    "type": "Replace",
                    "pattern": {"String": SPACE},
                    "content": " ",
                },
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": named["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: id for id, text in enumerate(texts)},
            "merges": merges(model.pieces),
        },
    }


def _text(piece):
    """A piece as transformers looks for it: in a text whose spaces are spaces.

    But not a run of spaces: there Google's file, too, has the blocks, and
    merges of blocks make it.
    """
    run = not piece.piece.strip(SPACE)
    if piece.type != USER_DEFINED or run:
        return piece.piece
    return piece.piece.replace(SPACE, " ")


def _check(model):
    spec, normal = model.trainer_spec, model.normalizer_spec
    wrong = []
    if spec.model_type != BPE:
        kind = spec.ModelType.Name(spec.model_type).lower()
        wrong.append(f"it is a {kind} model, expected BPE")
    if not spec.byte_fallback:
        wrong.append("it has no byte pieces")
    if normal.precompiled_charsmap:
        wrong.append(f"it rewrites characters ({normal.name or 'its own map'})")
    if normal.add_dummy_prefix:
        wrong.append("it puts a space before every text")
    if normal.remove_extra_whitespaces:
        wrong.append("it removes spaces")
    if not {"bos", "unk"} <= _named(model).keys():
        wrong.append("it names no <bos> or no <unk>")
    if wrong:
        raise UserError(
            "This vocabulary cannot be written as Gemma's tokenizer.json: "
            f"{'; '.join(wrong)}. Use a Gemma vocabulary."
        )


def _bos_first(piece, id):
    """The `tokenizers` post-processor that puts `<bos>` before a text."""

    def part(kind, name, type_id):
        return {kind: {"id": name, "type_id": type_id}}

    first = [part("SpecialToken", piece, 0), part("Sequence", "A", 0)]
    second = [part("SpecialToken", piece, 1), part("Sequence", "B", 1)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {
            piece: {"id": piece, "ids": [id], "tokens": [piece]}
        },
    }


def merges(pieces):
    """The merges of a SentencePiece BPE, first those that happen first.

    A run of spaces or newlines is a user-defined piece, and is found before
    anything else; among merges they come first, the longest left part before
    shorter ones, so that a run grows from its left to its longest piece.

    Args:
        pieces: of a `ModelProto`.

    Returns:
        List of "left right", which old versions of `tokenizers` read, too.
    """
    kinds = NORMAL, USER_DEFINED
    found = {p.piece for p in pieces if p.type in kinds}
    told = []
    for piece in pieces:
        if piece.type not in kinds or _text(piece) != piece.piece:
            continue
        text, early = piece.piece, piece.type == USER_DEFINED
        for i in range(len(text) - 1, 0, -1):
            if text[:i] in found and text[i:] in found:
                told.append((early, piece.score, i, text[:i], text[i:]))
    told.sort(key=lambda m: (m[0], m[1], m[2], len(m[4])), reverse=True)
    return [f"{left} {right}" for *_, left, right in told]
