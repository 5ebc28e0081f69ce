"""Templates that are Python format strings.

The text of a template is the user's own word: control tokens that it names are
those tokens. The text of a field is a record's and stays text.
"""

import re
import string

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import conversations, layouts, tools, values
from keras_gemma_ft.data.segments import (
    BOS,
    CONTROL,
    END,
    EOS,
    Segment,
    split,
)
from keras_gemma_ft.data.values import BadRecord

# What a template may call the answer that is to be learned.
_ALSO = {"chosen": ("response", "output", "answer", "completion")}
# A field's name -> "system" or "tools".
_ABOUT = {n: part for part, known in layouts.ABOUT_ALL.items() for n in known}


def load(spec, control=CONTROL):
    """A format string -> list of `Segment` and of field names in braces.

    In it, backslash-n means a new line (shells pass it so). What `control`
    finds in it is a control token.

    Raises:
        UserError: it is broken, names no field, or has a `<bos>` inside.
    """
    spec = spec.replace("\\n", "\n").replace("\\t", "\t")
    try:
        parsed = list(string.Formatter().parse(spec))
    except ValueError as error:
        raise UserError(f"data.template={spec!r}: {error}.") from error
    parts = []
    for literal, field, form, conversion in parsed:
        parts += split(literal, control=control)
        if field is None:
            continue
        # "{a.b}" and "{a!r}" would reach into Python's objects.
        if form or conversion or not re.fullmatch(r"[\w -]+", field):
            raise UserError(
                f"data.template: {{{field}}} must be a field's plain name."
            )
        parts.append(field)
    if not names(parts):
        raise UserError(
            f"data.template={spec!r} names no field, expected {{FIELD}} where "
            "a record's text goes; the last one is learned."
        )
    bos = Segment(BOS, control=True)
    if bos in parts[1:]:
        raise UserError(
            f"data.template={spec!r}: {BOS} stands inside. Every example "
            "begins with one; leave it out, or write it first."
        )
    return parts[1:] if parts[0] == bos else parts


def names(parts):
    """The fields that a loaded template reads."""
    return [part for part in parts if isinstance(part, str)]


def render(record, layout, parts):
    """The last field is learned, with what follows it up to an end.

    That end is the last `<end_of_turn>` or `<eos>` that the template writes
    after the field; if it writes none, `<eos>` is put behind.

    Returns:
        List of `Segment`, `<bos>` first.
    """
    fields = names(parts)
    texts = [_field(record, layout, name) for name in fields]
    asked = _told_first(texts[:-1], fields[:-1], _known(record, layout))
    weight = layouts.weight(record, layout) if texts[-1].strip() else 0.0
    before, after = around(parts)
    ends = [i for i, part in enumerate(after) if part.text in (END, EOS)]
    ends = [i for i in ends if after[i].control]
    if ends:
        learned, rest = after[: ends[-1] + 1], after[ends[-1] + 1 :]
    else:
        learned, rest = [*after, Segment(EOS, control=True)], []
    answer = _joined([Segment(texts[-1]), *learned])
    return [
        *_filled(before, asked),
        *(part._replace(learn=weight) for part in answer),
        *_joined(rest),
    ]


def prompt(question, parts, *, system="", described=""):
    """Everything before the last field, for a question that has one text.

    Args:
        question: the text of the first field that is neither system nor tools;
            the others stay empty.
        parts: what `load` returned.
        system: a system text; without a field {system} it goes before the
            question.
        described: the tools, in words; likewise of {tools}.

    Returns:
        List of `Segment`, `<bos>` first.
    """
    before, _ = around(parts)
    known = {"system": system, "tools": described}
    fields = names(before)
    if all(name in _ABOUT for name in fields):
        # The learned field is the only one: the question begins its text.
        before, fields = [*before, "prompt"], [*fields, "prompt"]
    texts, asked = [], question
    for name in fields:
        if name in _ABOUT:
            texts.append(known[_ABOUT[name]])
        else:
            texts.append(asked)
            asked = ""
    return _filled(before, _told_first(texts, fields, known))


def _known(record, layout):
    """What may be said before a question: {"system", "tools"}: text."""
    told = conversations.optional(record, layout, "system")
    tools_of = record.get(layout.fields.get("tools"))
    return {
        "system": told or layout.system,
        "tools": tools.describe(tools_of),
    }


def _told_first(texts, fields, known):
    """The texts of the fields, the first of which also says what is `known`.

    That is the system text and the tools for which the template has no field:
    they go before the first field that is neither.
    """
    named = {_ABOUT.get(name) for name in fields}
    rest = [text for part, text in known.items() if text and part not in named]
    first = next((i for i, n in enumerate(fields) if n not in _ABOUT), None)
    if not rest:
        return texts
    if first is None:
        raise BadRecord(
            "the template has no field before the answer that a system text "
            "or tools could stand in. Add {system} or {tools} to it"
        )
    told = "\n\n".join([*rest, texts[first]])
    return [*texts[:first], told, *texts[first + 1 :]]


def around(parts):
    """What stands before the last field, and after it."""
    last = max(i for i, part in enumerate(parts) if isinstance(part, str))
    return parts[:last], parts[last + 1 :]


def _filled(parts, texts):
    """`<bos>` and the parts, with texts for the fields."""
    texts = iter(texts)
    whole = [
        Segment(next(texts)) if isinstance(part, str) else part
        for part in parts
    ]
    return [Segment(BOS, control=True), *_joined(whole)]


def _joined(segments):
    """Neighbouring texts as one, which is tokenised at once."""
    joined = []
    for segment in segments:
        if joined and not segment.control and not joined[-1].control:
            segment = Segment(joined.pop().text + segment.text)
        joined.append(segment)
    return [segment for segment in joined if segment.text]


def _field(record, layout, field):
    """A template's field: the layout's part so called, else the record's."""
    for part, known in layouts.FORMATS[layout.format].items():
        if field in {part, *known, *_ALSO.get(part, ())}:
            if part in layouts.REQUIRED[layout.format]:
                if field not in record:
                    return conversations.value(record, layout, part)
            elif part in ("system", "tools"):
                return _known(record, layout)[part]
            elif part == "context":
                return conversations.optional(record, layout, part)
    if field not in record:
        raise BadRecord(
            f"the template wants field {field!r}; there are: "
            + ", ".join(record)
        )
    return values.as_text(record[field], f"field {field!r}")
