"""One record and the layout of all -> its turns, its texts, its weight."""

from keras_gemma_ft.data import layouts, tools, turns, values
from keras_gemma_ft.data.turns import Turn
from keras_gemma_ft.data.values import BadRecord


def read(record, layout, counts, *, answer="chosen"):
    """The turns of `record`: merged, so that no role comes twice in a row.

    Args:
        record: dict.
        layout: `Layout`; not of format `text`.
        counts: `collections.Counter` of what became of turns.
        answer: for `preference`, which answer: "chosen" or "rejected".

    Returns:
        List of `Turn`; empty when the record holds no answer.

    Raises:
        BadRecord: a field is missing or of a wrong type, or a role is unknown.
    """
    if layout.format == "messages":
        content = record.get(layout.fields["messages"])
        found = turns.messages(content, layout.roles)
    elif layout.format == "preference":
        found = _preference(record, layout, answer)
    else:
        found = _pair(record, layout)
    found = [*_system(record, layout, found), *found]
    found = turns.answered(turns.merge(found), counts)
    worth = layouts.weight(record, layout)
    found = [turn._replace(learn=turn.learn * worth) for turn in found]
    return add_tools(
        found, tools.describe(record.get(layout.fields.get("tools")))
    )


def _system(record, layout, found):
    """The system turn that goes before `found`, as a list."""
    text = optional(record, layout, "system")
    if not text and all(turn.role != "system" for turn in found):
        text = layout.system
    return [Turn("system", text)] if text else []


def add_tools(found, text):
    """Puts the description of the tools before the first user's text."""
    if not text or not found:
        return found
    roles = [turn.role for turn in found]
    if "user" not in roles:
        first = roles.index("model") if "model" in roles else len(found)
        return [*found[:first], Turn("user", text), *found[first:]]
    first = roles.index("user")
    told = found[first]._replace(text=f"{text}\n\n{found[first].text}")
    return [*found[:first], told, *found[first + 1 :]]


def _pair(record, layout):
    """The turns of a prompt and its response, either as text or as turns."""
    asked = turns.listed(record.get(layout.fields["prompt"]))
    if asked is None:
        before = [Turn("user", question(record, layout))]
    else:
        if context := layout.fields.get("context"):
            if not values.empty(record.get(context)):
                raise BadRecord(
                    f"field {context!r} stands beside a prompt that is a "
                    "list of turns, and has no place among them"
                )
        before = turns.as_context(turns.messages(asked, layout.roles))
    reply = record.get(layout.fields["response"])
    # A plain question's answer may well be JSON that looks like turns.
    if asked is not None or not isinstance(reply, str):
        if (told := turns.listed(reply)) is not None:
            return before + turns.messages(told, layout.roles)
    return [*before, Turn("model", value(record, layout, "response"))]


def value(record, layout, part):
    """The text of `part` of `record`; see `values.as_text`."""
    field = layout.fields[part]
    return values.as_text(record.get(field), f"field {field!r}")


def optional(record, layout, part):
    """As `value`; "" where the record does not have the part."""
    if values.empty(record.get(layout.fields.get(part))):
        return ""
    return value(record, layout, part)


def question(record, layout):
    """The prompt and, after a blank line, the context if there is one."""
    text = value(record, layout, "prompt")
    context = optional(record, layout, "context")
    return f"{text}\n\n{context}" if context else text


def _preference(record, layout, answer):
    """The conversation that ends in the answer; it alone is learned."""
    field = layout.fields[answer]
    content = record.get(field)
    told = turns.listed(content)
    if told is None:
        replies = [Turn("model", values.as_text(content, f"field {field!r}"))]
    else:
        replies = turns.messages(told, layout.roles)
    # Some sets repeat the whole conversation in each answer.
    if replies[0].role != "model":
        last = max(
            (i for i, t in enumerate(replies) if t.role == "model"), default=0
        )
        return turns.as_context(replies[:last]) + replies[last:]
    if "messages" in layout.fields:
        asked = record.get(layout.fields["messages"])
    elif "prompt" in layout.fields:
        asked = turns.listed(record.get(layout.fields["prompt"]))
    else:
        raise BadRecord("there is no prompt before the answer")
    if asked is None and "messages" not in layout.fields:
        return [Turn("user", question(record, layout)), *replies]
    asked = turns.messages(asked, layout.roles)
    return turns.as_context(asked) + replies
