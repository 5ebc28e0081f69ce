"""Turns -> segments marked learn / ignore; knows `<start_of_turn>`.

A segment is a piece of text, or one control token. Text is never searched for
control tokens, so a user who types `<end_of_turn>` cannot close a turn.

Gemma's format, with [learned] parts in brackets:

    <bos><start_of_turn>user\\nHi<end_of_turn>\\n
    <start_of_turn>model\\n[Hello<end_of_turn>]\\n

Texts are trimmed and there is no system role, as in Google's own chat template
(tokenizer_config.json of google/gemma-2-2b-it).
"""

import collections
import re
from typing import Any, NamedTuple

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import (
    conversations,
    format_strings,
    jinja,
    layouts,
    rendered,
    tools,
    turns,
)
from keras_gemma_ft.data.segments import BOS, CONTROL, END, START, Segment
from keras_gemma_ft.data.values import BadRecord


class Template(NamedTuple):
    """A way to write conversations.

    Attributes:
        kind: "gemma", "fields" (a format string) or "jinja".
        source: what was loaded.
        control: pattern of the names of control tokens.
    """

    kind: str
    source: Any = None
    control: re.Pattern = CONTROL


GEMMA = Template("gemma")


def load(spec, tokenizer=None):
    """Reads `--data.template`: "gemma", a format string, or a Jinja file.

    Args:
        spec: the setting.
        tokenizer: `tokens.Tokenizer`, whose control tokens a template may
            write; Gemma's own without it.

    Raises:
        UserError: it is none of the three, or is broken.
    """
    control = tokenizer.control if tokenizer else CONTROL
    if spec == "gemma":
        return GEMMA._replace(control=control)
    if jinja.is_file(spec):
        return Template("jinja", jinja.load(spec, tokenizer), control)
    if "{" in spec:
        parts = format_strings.load(spec, control)
        return Template("fields", parts, control)
    raise UserError(
        f"data.template={spec!r}: expected 'gemma', a format string such as "
        "'Q: {prompt}\\nA: {response}', or the path of a .jinja file (or of "
        "the tokenizer_config.json that holds one)."
    )


def render(record, layout, template=GEMMA, counts=None):
    """One record -> its segments.

    Args:
        record: dict.
        layout: `layouts.Layout` of the records.
        template: `Template`.
        counts: `collections.Counter` of what became of turns.

    Returns:
        List of `Segment`, `<bos>` first. Nothing is marked learned when the
        record holds no answer.

    Raises:
        BadRecord: the record does not have what the layout says.
        NeedsChoice: see `rendered.render`.
    """
    if layout.format == "text":
        _check_text(template, layout)
        text = conversations.value(record, layout, "text")
        segments = rendered.render(
            text,
            layouts.weight(record, layout),
            marks=layout.text_marks,
            learn=layout.learn,
            control=template.control,
        )
        if template.kind == "gemma":
            return segments
    if template.kind == "fields":
        return format_strings.render(record, layout, template.source)
    counts = collections.Counter() if counts is None else counts
    found = conversations.read(record, layout, counts)
    if template.kind == "jinja":
        return jinja.render(found, template.source)
    return _render_gemma(found)


def _check_text(template, layout):
    if template.kind == "jinja":
        raise UserError(
            "data.template is for conversations, but data.format=text. "
            "Leave out --data.template; --data.template=gemma, if it is the "
            "base's own."
        )
    if template.kind == "fields" and layout.text_marks == "parse":
        raise UserError(
            "--data.text_marks=parse takes the turns from the text itself, "
            "--data.template writes them. Leave out one of the two."
        )


def read_by(template):
    """The names of the fields that a format string reads; None of others."""
    if template.kind == "fields":
        return format_strings.names(template.source)
    return None


def prompt(question, template=GEMMA, *, system="", offered=None, roles=None):
    """Segments that ask for an answer, for inference; nothing is learned.

    Args:
        question: a string, or a list of messages that ends with a user's.
        template: `Template`.
        system: a system text, where the messages have none.
        offered: the tools, as records have them; see `tools.describe`.
        roles: {speaker's name: role}; by default `turns.ROLES`.

    Returns:
        List of `Segment`; with Gemma's it ends in `<start_of_turn>model\\n`.

    Raises:
        UserError: the messages are malformed or end with the assistant's.
    """
    try:
        if isinstance(question, str):
            found = [turns.Turn("user", question)]
        else:
            found = turns.messages(question, roles or turns.ROLES)
        found = turns.merge(found)
        if found[-1].role == "model":
            raise BadRecord("the last message must be the user's.")
        described = tools.describe(offered)
        if template.kind == "fields":
            text = "\n\n".join(turn.text for turn in found)
            return format_strings.prompt(
                text, template.source, system=system, described=described
            )
        if system and all(turn.role != "system" for turn in found):
            found = [turns.Turn("system", system), *found]
        found = conversations.add_tools(found, described)
        if template.kind == "jinja":
            return jinja.prompt(found, template.source)
    except BadRecord as error:
        raise UserError(f"prompt: {error}") from error
    return [*_render_gemma(turns.as_context(found)), *_gemma_turn("model", [])]


def _render_gemma(found):
    segments = [Segment(BOS, control=True)]
    for role, text, weight in _without_system(found):
        learn = weight if role == "model" and text.strip() else 0.0
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

    def fold(text=""):
        told = [*pending, *filter(None, [text])]
        pending.clear()
        folded.append(turns.Turn("user", "\n\n".join(told)))

    for turn in found:
        if turn.role == "system":
            pending.append(turn.text.strip())
        elif pending and turn.role == "user":
            fold(turn.text.strip())
        else:
            if pending:
                fold()
            folded.append(turn)
    if pending:
        fold()
    return turns.merge(folded)
