"""One JSON document -> its records, in the shapes that people store them.

Known are a list of objects, one object, a list inside an object with notes
beside it (`{"version": 1, "data": [...]}`), and columns (`{"prompt": ["a", "b"],
"response": ["c", "d"]}`, or pandas' `{"prompt": {"0": "a", "1": "b"}, ...}`).
"""

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import layouts, turns

# Every name that a format has for a field.
_FIELDS = {
    name
    for parts in layouts.FORMATS.values()
    for names in parts.values()
    for name in names
}


def records(document, path):
    """The list of records that a JSON document holds.

    Args:
        document: what was parsed.
        path: of the file, for messages.

    Raises:
        UserError: it holds several lists of records, or columns of different
            lengths.
    """
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or not document:
        return [document]
    lists = {name: value for name, value in document.items() if _is_list(value)}
    if lists and not _FIELDS & {name.lower() for name in document}:
        return _only(lists, path)
    if all(isinstance(value, list) for value in document.values()):
        if not any(map(turns.listed, document.values())):
            return _columns(document, path)
    if all(map(_is_numbered, document.values())):
        indices = [list(value) for value in document.values()]
        if all(index == indices[0] for index in indices):
            columns = {k: list(v.values()) for k, v in document.items()}
            return _columns(columns, path)
    return [document]


def _is_list(value):
    """Whether it is a list of records: of objects that are no turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) for item in value)
        and turns.listed(value) is None
    )


def _is_numbered(value):
    """Whether it is a column as pandas writes it: {"0": ..., "1": ...}."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and key.isdigit() for key in value)
    )


def _only(lists, path):
    if len(lists) > 1:
        told = ", ".join(f"{name} ({len(v)})" for name, v in lists.items())
        raise UserError(
            f"{path} holds several lists of records: {told}. Write each into a "
            "file of its own and name the one you mean."
        )
    return next(iter(lists.values()))


def _columns(columns, path):
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise UserError(
            f"{path} looks like columns, whose lengths differ ({told}). Write "
            "it as a list of records: [{...}, {...}]."
        )
    rows = zip(*columns.values())
    return [dict(zip(columns, row)) for row in rows]
