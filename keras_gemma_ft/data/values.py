"""A field's value as text: what is understood, and what is refused.

Text is never the serialisation of a list or an object: a model that learns
`[{"role": "assistant", ...}]` answers with brackets from then on.
"""

import json
import math


class BadRecord(ValueError):
    """One record cannot be used; the message says why."""


class NeedsChoice(BadRecord):
    """It can be read in two ways, and the user must say which: no bad row."""


def missing(value):
    """Whether there is no value: null, or the NaN that tables have for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def empty(value):
    """Whether a value says nothing: missing, or a text or list of nothing."""
    return missing(value) or value in ("", (), []) or value == {}


def as_text(value, what):
    """`value` as text.

    Strings are taken as they are, numbers as JSON writes them (1.0 as "1":
    tables with a gap hold their integers as floats), a list of content parts
    `{"type": "text", "text": ...}` as their texts, a line each.

    Args:
        value: what a record holds.
        what: its name in messages, such as "field 'prompt'".

    Raises:
        BadRecord: the value is missing, or is no text.
    """
    if isinstance(value, str):
        return value
    if missing(value):
        raise BadRecord(f"{what} is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    parts = [value] if isinstance(value, dict) else value
    if isinstance(parts, (list, tuple)) and parts:
        texts = list(map(_part, parts))
        if None not in texts:
            return "\n".join(texts)
    reason = f"{what} is {_kind(value)}, expected text"
    if isinstance(value, (dict, list, tuple)):
        reason += " (if JSON is to be learned, write it as a string)"
    raise BadRecord(reason)


def _part(part):
    """The text of one content part; None where it is something else."""
    if not isinstance(part, dict) or "role" in part or "from" in part:
        return None
    text = part.get("text")
    known = part.keys() <= {"type", "text"} and part.get("type", "text")
    return text if isinstance(text, str) and known == "text" else None


def _kind(value):
    """What a value is, in words: "a list of 2 (str)", "a bytes"."""
    if isinstance(value, (list, tuple)):
        inner = sorted({type(item).__name__ for item in value})
        return f"a list of {len(value)} ({', '.join(inner) or 'empty'})"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value)) or 'no field'}"
    return f"a {type(value).__name__}"


def weight(holder, what):
    """How much a record or message counts: its `weight` times its `train`.

    Args:
        holder: dict; both fields are optional, and 1 where absent.
        what: its name in messages, such as "turn 2".

    Raises:
        BadRecord: one of them is no finite number of at least 0.
    """
    product = 1.0
    for field in ("weight", "train"):
        value = holder.get(field)
        if empty(value):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise BadRecord(
                f"{what} has {field}={value!r}, expected 0, 1 or another "
                "number that is not negative"
            )
        product *= number
    return product
