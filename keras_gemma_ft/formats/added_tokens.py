"""Tokens that other tools put beside a vocabulary, from every file of a folder.

`tokenizer.json` lists them, `added_tokens_decoder` of `tokenizer_config.json`
and `added_tokens.json`, of before 2023; `tokenizer_config.json` and
`special_tokens_map.json` name those that are special.
"""

import re
from typing import NamedTuple

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import tokenizer_json
from keras_gemma_ft.formats.huggingface import read_json

# Offenders shown of each kind.
SHOWN = 5
# Of an added token: what beside it in a text is swallowed, or must be there.
_UNFOLLOWED = ("lstrip", "rstrip", "single_word")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where tools list further special tokens, by name alone.
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Rows of a table, where config.json does not say how many there are.
_MOST = 1 << 20
_CURE = (
    "Save the tokenizer again with transformers (save_pretrained), or remove "
    "the file that is out of date from the folder."
)


class Added(NamedTuple):
    """An added token.

    Attributes:
        text: its name, or the text that it stands for.
        special: whether no text becomes it.
        file: where it is listed.
        beside: settings by which it changes the text beside it.
    """

    text: str
    special: bool
    file: str
    beside: tuple = ()


class Files(NamedTuple):
    """A folder's files as they are; None of those that are not there."""

    proto: bytes | None
    whole: dict | None
    settings: dict
    extra: dict
    names: dict
    config: dict
    generation: dict

    def named(self):
        """{"bos_token": its name, ...}."""
        told = {**self.names, **self.settings}
        found = {name: _content(told.get(name)) for name in _NAMES}
        return {name: text for name, text in found.items() if text}

    def roles(self):
        """{"bos": the piece, ...}: Gemma's own, or what the files say."""
        vocabulary = tokenizer_json.vocabulary(self.whole)
        found = {}
        for role in ("pad", "eos", "bos"):
            own, told = f"<{role}>", self.named().get(f"{role}_token")
            found[role] = own if own in vocabulary else told
        return {role: piece for role, piece in found.items() if piece}

    def special(self):
        """The names that the settings list as special tokens."""
        found = [*self.named().values()]
        for told in (self.names, self.settings):
            for name in _LISTS:
                listed = told.get(name) or ()
                listed = listed.values() if type(listed) is dict else listed
                found += map(_content, listed)
        return dict.fromkeys(filter(None, found))


def files(folder):
    """`Files` of a `pathlib.Path`; UserError if one of them is broken."""

    def read_if(name):
        return read_json(folder / name) if (folder / name).is_file() else None

    model = folder / "tokenizer.model"
    return Files(
        model.read_bytes() if model.is_file() else None,
        read_if("tokenizer.json"),
        read_if("tokenizer_config.json") or {},
        read_if("added_tokens.json") or {},
        read_if("special_tokens_map.json") or {},
        # An adapter's folder has none.
        read_if("config.json") or {},
        read_if("generation_config.json") or {},
    )


def _content(token):
    """The text of a token that is named by it or by a dict; "" of others."""
    if type(token) is dict:
        token = token.get("content")
    return token if type(token) is str else ""


def _listed(files):
    """Yields (file, id, settings of an added token) of all files."""
    told = (files.whole or {}).get("added_tokens") or []
    for token in told if type(told) is list else [told]:
        id = token.get("id") if type(token) is dict else None
        yield "tokenizer.json", id, token
    told = files.settings.get("added_tokens_decoder") or {}
    for id, token in told.items() if type(told) is dict else [(None, told)]:
        id = int(id) if re.fullmatch(r"[0-9]{1,9}", str(id)) else id
        yield "tokenizer_config.json", id, token
    for text, id in files.extra.items():
        yield "added_tokens.json", id, {"content": text}


def read(files):
    """{id: `Added`} of a folder's files.

    Raises:
        UserError: one is no token, or they contradict each other.
    """
    rows = files.config.get("vocab_size")
    rows = rows if type(rows) is int else _MOST
    special, found, ids, wrong = files.special(), {}, {}, []
    for file, id, told in _listed(files):
        text = _content(told)
        if type(id) is not int or id < 0 or not text:
            wrong.append(f"{file}: {told!r:.80} (id {id!r:.20}) is no token")
            continue
        if id >= rows:
            wrong.append(
                f"{file}: {text!r} has the id {id}, and the model {rows} rows"
            )
            continue
        # Of transformers 5 the list has every piece that is no plain text.
        flag = told.get("special", text in special) is True
        beside = tuple(name for name in _UNFOLLOWED if told.get(name))
        token = Added(text, flag, file, beside)
        other = found.setdefault(id, token)
        if other.text != text:
            wrong.append(
                f"{file}: {id} is {text!r}, in {other.file} {other.text!r}"
            )
        if ids.setdefault(text, id) != id:
            wrong.append(f"{file}: {text!r} is {id}, elsewhere {ids[text]}")
        found[id] = other._replace(special=other.special or flag)
    if wrong:
        raise UserError(complaint("The added tokens cannot be followed", wrong))
    return dict(sorted(found.items()))


def complaint(what, wrong):
    """A message that lists the first offenders and says what to do."""
    rest = len(wrong) - SHOWN
    more = [f"and {rest} more"] if rest > 0 else []
    return f"{what}:\n  " + "\n  ".join(wrong[:SHOWN] + more) + f"\n{_CURE}"
