"""Turns -> segments marked learn / ignore; knows `<start_of_turn>`.

A segment is a piece of text, or one control token. Text is never searched for
control tokens, so a user who types `<end_of_turn>` cannot close a turn.

Gemma's format, with [learned] parts in brackets:

    <bos><start_of_turn>user\\nHi<end_of_turn>\\n
    <start_of_turn>model\\n[Hello<end_of_turn>]\\n

Texts are trimmed and there is no system role, as in Google's own chat template
(tokenizer_config.json of google/gemma-2-2b-it).
"""

import re
import string
from typing import Any, NamedTuple

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import jinja, layouts
from keras_gemma_ft.data.segments import BOS, END, EOS, Segment

START = "<start_of_turn>"
# What a template may call the answer that is to be learned.
_ALSO = {"chosen": ("response", "output", "answer", "completion")}


class Template(NamedTuple):
    """kind: "gemma", "fields" (a format string) or "jinja"; its source."""

    kind: str
    source: Any = None


GEMMA = Template("gemma")


def load(spec):
    """Reads `--data.template`: "gemma", a format string, or a .jinja file.

    In a format string, backslash-n means a new line (shells pass it so).

    Raises:
        UserError: it is none of the three, or is broken.
    """
    if spec == "gemma":
        return GEMMA
    if spec.endswith((".jinja", ".jinja2", ".j2")):
        return Template("jinja", jinja.load(spec))
    if "{" in spec:
        return Template("fields", _load_fields(spec))
    raise UserError(
        f"data.template={spec!r}: expected 'gemma', a format string such as "
        "'Q: {prompt}\\nA: {response}', or the path of a .jinja file."
    )


def render(record, layout, template=GEMMA):
    """One record -> its segments.

    Args:
        record: dict.
        layout: `layouts.Layout` of the records.
        template: `Template`.

    Returns:
        List of `Segment`, `<bos>` first. Nothing is marked learned when the
        record holds no answer.

    Raises:
        layouts.BadRecord: the record does not have what the layout says.
    """
    if template.kind == "fields":
        return _render_fields(record, layout, template.source)
    if layout.format == "text":
        if template.kind != "gemma":
            raise UserError(
                "data.template is for conversations, but data.format=text. "
                "Leave out --data.template."
            )
        text = layouts.value(record, layout, "text")
        learn = bool(text.strip())
        return [
            Segment(BOS, control=True),
            Segment(text, learn),
            Segment(EOS, learn, control=True),
        ]
    found = layouts.turns(record, layout)
    if template.kind == "jinja":
        return jinja.render(found, template.source)
    return _render_gemma(found)


def prompt(question, template=GEMMA):
    """Segments that ask for an answer, for inference; nothing is learned.

    Args:
        question: a string, or a list of messages that ends with a user's.
        template: `Template`.

    Returns:
        List of `Segment`; with Gemma's it ends in `<start_of_turn>model\\n`.

    Raises:
        UserError: the messages are malformed or end with the assistant's.
    """
    try:
        if isinstance(question, str):
            found = [layouts.Turn("user", question)]
        else:
            found = layouts.merge(layouts.messages(question))
    except layouts.BadRecord as error:
        raise UserError(f"prompt: {error}") from error
    if found[-1].role == "model":
        raise UserError("prompt: the last message must be the user's.")
    if template.kind == "fields":
        return _prompt_fields(found, template.source)
    if template.kind == "jinja":
        return jinja.prompt(found, template.source)
    return [*_render_gemma(found), *_gemma_turn("model", [])]


def _render_gemma(found):
    segments = [Segment(BOS, control=True)]
    for role, text in _without_system(found):
        learn = role == "model" and bool(text.strip())
        if role == "model":
            body = [Segment(text.strip(), learn)]
        else:
            body = [Segment(f"user\n{text.strip()}")]
        end = [Segment(END, learn, control=True), Segment("\n")]
        segments += _gemma_turn(role, body + end)
    return segments


def _gemma_turn(role, rest):
    """`<start_of_turn>`, the role's line and `rest`.

    A user's line joins the text it begins: one text, tokenised at once, as
    Google's. A model's stands alone, as it does when an answer is generated.
    """
    head = [Segment("model\n")] if role == "model" else []
    return [Segment(START, control=True), *head, *rest]


def _without_system(found):
    """Puts each system text before the user's text that follows it."""
    folded, pending = [], []
    for role, text in found:
        if role == "system":
            pending.append(text.strip())
            continue
        if pending and role == "model":
            folded.append(layouts.Turn("user", "\n\n".join(pending)))
        elif pending:
            text = "\n\n".join([*pending, text.strip()])
        pending = []
        folded.append(layouts.Turn(role, text))
    if pending:
        folded.append(layouts.Turn("user", "\n\n".join(pending)))
    return layouts.merge(folded)


def _load_fields(spec):
    """A format string -> list of (literal, field or None)."""
    spec = spec.replace("\\n", "\n").replace("\\t", "\t")
    try:
        parts = list(string.Formatter().parse(spec))
    except ValueError as error:
        raise UserError(f"data.template={spec!r}: {error}.") from error
    for _, field, form, conversion in parts:
        # "{a.b}" and "{a!r}" would reach into Python's objects.
        if field is not None and (
            form or conversion or not re.fullmatch(r"[\w -]+", field)
        ):
            raise UserError(
                f"data.template: {{{field}}} must be a field's plain name."
            )
    if all(field is None for _, field, _, _ in parts):
        raise UserError(
            f"data.template={spec!r} names no field, expected {{FIELD}} where "
            "a record's text goes; the last one is learned."
        )
    return [(literal, field) for literal, field, _, _ in parts]


def _render_fields(record, layout, parts):
    """The last field is learned, with what follows it and `<eos>`."""
    last = max(i for i, (_, field) in enumerate(parts) if field is not None)
    before, answer, after = "", "", ""
    for i, (literal, field) in enumerate(parts):
        if i <= last:
            before += literal
        else:
            after += literal
        if i < last:
            before += _field(record, layout, field)
        elif i == last:
            answer = _field(record, layout, field)
    learn = bool(answer.strip())
    body = [Segment(before), Segment(answer + after, learn)]
    return [
        Segment(BOS, control=True),
        *(segment for segment in body if segment.text),
        Segment(EOS, learn, control=True),
    ]


def _field(record, layout, field):
    """A template's field: the layout's part so called, else the record's."""
    for part, names in layouts.FORMATS[layout.format].items():
        if field in {part, *names, *_ALSO.get(part, ())}:
            if part in layouts.REQUIRED[layout.format]:
                if field not in record:
                    return layouts.value(record, layout, part)
            elif part in ("context", "system"):
                return layouts.optional(record, layout, part)
    if field not in record:
        raise layouts.BadRecord(
            f"the template wants field {field!r}; there are: "
            + ", ".join(record)
        )
    return layouts.as_text(record[field], f"field {field!r}")


def _prompt_fields(found, parts):
    """Everything before the last field; the question is the first field."""
    text = "\n\n".join(turn.text for turn in found)
    fields = [i for i, (_, field) in enumerate(parts) if field is not None]
    before = ""
    for i, (literal, _) in enumerate(parts[: fields[-1] + 1]):
        before += literal
        if i == fields[0] and len(fields) > 1:
            before += text
    if len(fields) == 1:
        before += text
    return [Segment(BOS, control=True), Segment(before)]
