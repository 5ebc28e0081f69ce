"""A record's fields -> its turns: what each format calls its parts.

Formats: text, prompt_response, instruction, messages, preference. The names
that people give to the fields are listed in `FORMATS`; they match in any case.
"""

import dataclasses
import json
from typing import NamedTuple

from keras_gemma_ft.config import UserError

_PROMPT = ("prompt", "question", "q", "query", "problem", "input")
_RESPONSE = ("response", "completion", "answer", "a", "output", "solution")
_MESSAGES = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")

# format -> part -> names. A format's REQUIRED parts recognise it, in this
# order: the more parts a format needs, the earlier it stands.
FORMATS = {
    "preference": {
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "messages": _MESSAGES,
        "prompt": ("prompt", "question", "instruction", "query"),
        "context": ("context", "input"),
        "system": _SYSTEM,
    },
    "messages": {"messages": _MESSAGES, "system": _SYSTEM},
    "instruction": {
        "prompt": ("instruction",),
        "response": ("output", "response", "answer", "completion", "target"),
        "context": ("input", "context"),
        "system": _SYSTEM,
    },
    "prompt_response": {
        "prompt": _PROMPT,
        "response": _RESPONSE,
        "context": ("context",),
        "system": _SYSTEM,
    },
    "text": {"text": ("text", "content")},
}
REQUIRED = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "instruction": ("prompt", "response"),
    "prompt_response": ("prompt", "response"),
    "text": ("text",),
}
# What may stand beside `text` and surely is no answer to it.
_ABOUT = frozenset(
    "id idx index url source meta metadata timestamp date created author "
    "title lang language license licence label score".split()
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "tool": "user",
    "observation": "user",
    "assistant": "model",
    "model": "model",
    "gpt": "model",
    "bot": "model",
    "function_call": "model",
}


class BadRecord(ValueError):
    """One record cannot be used; the message says why."""


class Turn(NamedTuple):
    """One message: role is "system", "user" or "model"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which field of a record is which part of its format.

    Attributes:
        format: a key of `FORMATS`.
        fields: part -> field name, such as {"prompt": "Q", "response": "A"}.
        ignored: the fields that nothing reads.
    """

    format: str
    fields: dict
    ignored: tuple = ()

    def __str__(self):
        parts = ", ".join(f"{k}={v!r}" for k, v in self.fields.items())
        rest = f"; not read: {', '.join(self.ignored)}" if self.ignored else ""
        return f"format {self.format} ({parts}{rest})"


def recognise(records, *, format="auto", prompt_field="", response_field=""):
    """Tells the layout of `records` from the fields of the first hundred.

    Args:
        records: list of dicts.
        format: "auto" or a key of `FORMATS`.
        prompt_field: the field that holds the prompt, if named.
        response_field: the field that holds the response (for `text`, the
            text), if named.

    Returns:
        A `Layout`, which holds for all records.

    Raises:
        UserError: nothing fits; the message shows the fields that came, what
            each format expects and what to type.
    """
    fields = list(dict.fromkeys(f for r in records[:100] for f in r))
    named = {"prompt": prompt_field, "response": response_field}
    if format == "text":
        named = {"text": response_field or prompt_field}
    named = {part: field for part, field in named.items() if field}
    absent = [field for field in named.values() if field not in fields]
    if absent or (format != "auto" and format not in FORMATS):
        raise UserError(_unrecognised(fields, format, absent))
    if format == "auto" and named:
        candidates = ["prompt_response"]
    else:
        candidates = list(FORMATS) if format == "auto" else [format]
    for candidate in candidates:
        found = _parts(candidate, fields, named)
        ignored = [f for f in fields if f not in found.values()]
        others = {f.lower() for f in ignored} - _ABOUT
        if candidate == "text" and format == "auto" and others:
            continue
        if all(part in found for part in REQUIRED[candidate]):
            return Layout(candidate, found, tuple(ignored))
    raise UserError(_unrecognised(fields, format, absent))


def _parts(format, fields, named):
    """part -> field for every part of `format` that is among `fields`."""
    by_name = {field.lower(): field for field in reversed(fields)}
    found = dict(named)
    for part, names in FORMATS[format].items():
        for name in names:
            field = by_name.get(name)
            if part not in found and field and field not in found.values():
                found[part] = field
    return found


def _unrecognised(fields, format, absent):
    fields = [f if len(f) < 40 else f"{f[:39]}..." for f in fields]
    lines = [
        f"data.format={format} does not fit the records.",
        f"Fields that came: {', '.join(fields) or 'none'}",
    ]
    if any(f.endswith("...") for f in fields):
        lines.append("These look like data: is the header line missing?")
    if absent:
        lines.append(f"Named, but not there: {', '.join(absent)}")
    lines.append("Formats and their fields:")
    for name, parts in FORMATS.items():
        shown = [
            "|".join(names) if part in REQUIRED[name] else f"[{names[0]}]"
            for part, names in parts.items()
        ]
        lines.append(f"  {name}: {' + '.join(shown)}")
    first, second = (fields + ["FIELD", "FIELD"])[:2]
    lines.append(
        "Name the fields, for example: "
        f"--data.prompt_field={first} --data.response_field={second}, or "
        f"learn one whole: --data.format=text --data.response_field={first}"
    )
    return "\n".join(lines)


def turns(record, layout, *, answer="chosen"):
    """The turns of `record`: merged, so that no role comes twice in a row.

    A trailing user turn is dropped, since nothing answers it.

    Args:
        record: dict.
        layout: `Layout`; not of format `text`.
        answer: for `preference`, which answer: "chosen" or "rejected".

    Returns:
        List of `Turn`; empty when the record holds no answer.

    Raises:
        BadRecord: a field is missing or of a wrong type, a role is unknown, or
            the first turn is an assistant's.
    """
    found = []
    system = optional(record, layout, "system")
    if system:
        found.append(Turn("system", system))
    if layout.format == "messages":
        found += messages(record.get(layout.fields["messages"]))
    elif layout.format == "preference":
        found += _preference(record, layout, answer)
    else:
        found.append(Turn("user", question(record, layout)))
        found.append(Turn("model", value(record, layout, "response")))
    found = merge(found)
    while found and found[-1].role != "model":
        found.pop()
    return found


def value(record, layout, part):
    """The text of `part` of `record`; numbers and objects as JSON text."""
    field = layout.fields[part]
    return as_text(record.get(field), f"field {field!r}")


def as_text(content, what):
    """`content` as text: strings as they are, the rest as JSON text."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRecord(f"{what} is missing")
    try:
        return json.dumps(content, ensure_ascii=False)
    except (TypeError, ValueError):
        kind = type(content).__name__
        raise BadRecord(f"{what} is a {kind}, expected text") from None


def optional(record, layout, part):
    """As `value`; "" where the record does not have the part."""
    if record.get(layout.fields.get(part)) in (None, ""):
        return ""
    return value(record, layout, part)


def question(record, layout):
    """The prompt and, after a blank line, the context if there is one."""
    text = value(record, layout, "prompt")
    context = optional(record, layout, "context")
    return f"{text}\n\n{context}" if context else text


def messages(content):
    """A list of {"role"|"from", "content"|"value"} -> list of `Turn`."""
    if not isinstance(content, (list, tuple)) or not content:
        kind = type(content).__name__
        raise BadRecord(f"messages must be a list of turns, got {kind}")
    return [_message(i, message) for i, message in enumerate(content, 1)]


def _message(number, message):
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise BadRecord(f"turn {number} must be an object, got {kind}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRecord(
            f"turn {number} has role {role!r}, expected one of "
            + ", ".join(ROLES)
        )
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "\n".join(_piece(number, piece) for piece in content)
    return Turn(ROLES[role.lower()], as_text(content, f"turn {number}'s text"))


def _piece(number, piece):
    """The text of one {"type": "text", "text": ...} of a turn."""
    if isinstance(piece, dict) and isinstance(piece.get("text"), str):
        return piece["text"]
    raise BadRecord(f"turn {number} holds something other than text")


def _preference(record, layout, answer):
    field = layout.fields[answer]
    content = record.get(field)
    if isinstance(content, dict) and {"role", "from"} & content.keys():
        content = [content]
    if isinstance(content, list):
        replies = messages(content)
    else:
        replies = [Turn("model", as_text(content, f"field {field!r}"))]
    # Some sets repeat the whole conversation in each answer.
    if replies[0].role != "model":
        return replies
    if "messages" in layout.fields:
        return messages(record.get(layout.fields["messages"])) + replies
    if "prompt" not in layout.fields:
        raise BadRecord("there is no prompt before the answer")
    prompt = record.get(layout.fields["prompt"])
    if isinstance(prompt, list):
        return messages(prompt) + replies
    return [Turn("user", question(record, layout)), *replies]


def merge(found):
    """Joins neighbours of one role, with a blank line between their texts.

    Raises:
        BadRecord: an assistant's turn comes before any other.
    """
    merged = []
    for turn in found:
        if merged and merged[-1].role == turn.role:
            turn = Turn(turn.role, f"{merged.pop().text}\n\n{turn.text}")
        merged.append(turn)
    if merged and merged[0].role == "model":
        raise BadRecord("the first turn is the assistant's, expected a user's")
    return merged
