"""A record's fields -> its turns: what each format calls its parts.

Formats: text, prompt_response, instruction, messages, preference. The names
that people give to the fields are listed in `FORMATS`; they match in any case.
"""

import dataclasses

from keras_gemma_ft.config import Data, UserError
from keras_gemma_ft.data import turns, values

_PROMPT = ("prompt", "question", "q", "query", "problem", "input")
_RESPONSE = ("response", "completion", "answer", "a", "output", "solution")
_MESSAGES = ("messages", "conversations", "conversation")
# What may stand beside every conversation.
ABOUT_ALL = {
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}

# format -> part -> names. A format's REQUIRED parts recognise it, in this
# order: the more parts a format needs, the earlier it stands.
FORMATS = {
    "preference": {
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "messages": _MESSAGES,
        "prompt": ("prompt", "question", "instruction", "query"),
        "context": ("context", "input"),
        **ABOUT_ALL,
    },
    "messages": {"messages": _MESSAGES, **ABOUT_ALL},
    "instruction": {
        "prompt": ("instruction",),
        "response": ("output", "response", "answer", "completion", "target"),
        "context": ("input", "context"),
        **ABOUT_ALL,
    },
    "prompt_response": {
        "prompt": _PROMPT,
        "response": _RESPONSE,
        "context": ("context",),
        **ABOUT_ALL,
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
    "title lang language license licence".split()
)
# Fields that may say how much an answer is worth, or that it is a bad one, or
# hold what the model is to see: a run that passes them over learns other things
# than the records say.
MEANING = frozenset(
    "label labels score scores rating ratings reward rewards margin kto_tag "
    "desirable chosen rejected weight weights train tools functions system "
    "system_prompt image images audio audios video videos".split()
)
# Read wherever they are; see `values.weight`.
_WEIGHTS = ("weight", "train")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which field of a record is which part of its format.

    Attributes:
        format: a key of `FORMATS`.
        fields: part -> field name, such as {"prompt": "Q", "response": "A"}.
        ignored: the fields that nothing reads.
        roles: {speaker's name: role}, from `turns.speakers`.
        system: a system text for the records that have none.
        ignore: fields of `MEANING` that may be passed over.
        text_marks, learn: of `text`; see `config.Data`.
    """

    format: str
    fields: dict
    ignored: tuple = ()
    roles: dict = dataclasses.field(default_factory=lambda: turns.ROLES)
    system: str = ""
    ignore: tuple = ()
    text_marks: str = "stop"
    learn: str = "all"

    def __str__(self):
        parts = ", ".join(f"{k}={v!r}" for k, v in self.fields.items())
        rest = f"; not read: {', '.join(self.ignored)}" if self.ignored else ""
        return f"format {self.format} ({parts}{rest})"


def recognise(records, data=Data()):
    """Tells the layout of `records` from the fields of the first hundred.

    Args:
        records: list of dicts.
        data: `config.Data`; its format and what it names count.

    Returns:
        A `Layout`, which holds for all records.

    Raises:
        UserError: nothing fits; the message shows the fields that came, what
            each format expects and what to type.
    """
    format = data.format
    fields = list(dict.fromkeys(f for r in records[:100] for f in r))
    named = {"prompt": data.prompt_field, "response": data.response_field}
    if format == "text":
        named = {"text": data.response_field or data.prompt_field}
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
        read = {*found.values(), *_WEIGHTS}
        ignored = [f for f in fields if f not in read]
        others = {f.lower() for f in ignored} - _ABOUT - MEANING
        if candidate == "text" and format == "auto" and others:
            continue
        if all(part in found for part in REQUIRED[candidate]):
            return _layout(candidate, found, ignored, data)
    raise UserError(_unrecognised(fields, format, absent))


def _layout(format, fields, ignored, data):
    if format == "text" and data.learn == "answers":
        if data.text_marks != "parse":
            raise UserError(
                "--data.learn=answers needs the turns of a text record, which "
                "its control tokens tell. Add --data.text_marks=parse."
            )
    allowed = filter(None, map(str.strip, data.ignore.split(",")))
    return Layout(
        format,
        fields,
        tuple(ignored),
        roles=turns.speakers(data.roles),
        system=data.system.strip(),
        ignore=tuple(allowed),
        text_marks=data.text_marks,
        learn=data.learn,
    )


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


def weight(record, layout):
    """How much a record counts, unless its weight is to be ignored."""
    told = {k: v for k, v in record.items() if k not in layout.ignore}
    return values.weight(told, "the record")


def passed_over(record, layout, template=None):
    """The fields that change what a record means and that nothing reads.

    Those are the fields of `MEANING`, of its messages, too, and a context that
    the template has no place for; an empty value says nothing.

    Args:
        record: dict.
        layout: `Layout`.
        template: the names of the fields that a format string reads, if the
            template is one.

    Returns:
        {field: its value}.
    """
    also = template or ()
    holders = [(record, {*layout.fields.values(), *also})]
    context = layout.fields.get("context")
    left = template is not None and not {
        context, "context", *FORMATS[layout.format].get("context", ())
    } & {*also}  # fmt: skip
    for part in ("messages", "prompt", "response", "chosen", "rejected"):
        spoken = turns.listed(record.get(layout.fields.get(part)))
        holders += [(m, ()) for m in spoken or () if isinstance(m, dict)]
    return {
        field: value
        for holder, read in holders
        for field, value in holder.items()
        if (
            (field.lower() in MEANING and field not in {*read, *_WEIGHTS})
            or (left and holder is record and field == context)
        )
        and field not in layout.ignore
        and not values.empty(value)
    }
