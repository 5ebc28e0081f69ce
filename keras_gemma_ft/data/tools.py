"""Tools, calls and results as text in Gemma 2's turns, which know none.

The form is the one of NousResearch's Hermes models, which vLLM reads back with
`--tool-call-parser hermes`: the functions stand in the first user turn, a call
is text of the model's, a result is a user's turn.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

    <tool_response>
    {"celsius": 4}
    </tool_response>

Several calls of one turn follow each other, and so do their results, in the
order of the calls.
"""

import json

from keras_gemma_ft.data import values
from keras_gemma_ft.data.values import BadRecord

_INTRODUCTION = """\
You can call these functions. Each line describes one of them in JSON.
{functions}
To call a function, answer with its name and its arguments in this form:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def describe(tools):
    """The text that tells the model of its functions; "" without any.

    Args:
        tools: list of `{"type": "function", "function": {...}}` or of the
            inner objects, or either as JSON text, as tables hold it.

    Raises:
        BadRecord: a tool has no name, or the JSON is broken.
    """
    if values.empty(tools):
        return ""
    tools = _parsed(tools, "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, (list, tuple)):
        raise BadRecord(f"tools must be a list, got {tools!r:.80}")
    lines = []
    for number, tool in enumerate(tools, 1):
        tool = _parsed(tool, f"tool {number}")
        inner = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(inner, dict) or not inner.get("name"):
            raise BadRecord(f"tool {number} has no name: {tool!r:.80}")
        lines.append(json.dumps(inner, ensure_ascii=False))
    if not lines:
        return ""
    return _INTRODUCTION.format(functions="\n".join(lines))


def calls(message, what):
    """`(text, ids)` of a message's calls; `("", [])` where it makes none.

    Args:
        message: dict with `tool_calls` (a list), or the older `function_call`.
        what: its name in messages, such as "turn 2".

    Raises:
        BadRecord: a call has no name, or its arguments are no JSON object.
    """
    found = message.get("tool_calls")
    if values.empty(found):
        found = message.get("function_call")
    if values.empty(found):
        return "", []
    return _calls(_parsed(found, f"{what}'s call"), what)


def call(text, what):
    """As `calls`, of ShareGPT's `function_call`, whose text is JSON."""
    return _calls(_parsed(text, f"{what}'s call"), what)[0]


def _calls(found, what):
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, (list, tuple)):
        raise BadRecord(f"{what} calls {found!r:.80}, expected an object")
    texts, ids = [], []
    for one in found:
        inner = one.get("function", one) if isinstance(one, dict) else {}
        if not isinstance(inner, dict) or not inner.get("name"):
            raise BadRecord(f"{what} calls a function without a name")
        arguments = inner.get("arguments")
        if values.empty(arguments):
            arguments = {}
        arguments = _parsed(arguments, f"{what}'s arguments")
        if not isinstance(arguments, dict):
            raise BadRecord(
                f"{what} calls {inner['name']} with {arguments!r:.80}, "
                "expected an object of arguments"
            )
        told = {"name": inner["name"], "arguments": arguments}
        line = json.dumps(told, ensure_ascii=False)
        texts.append(f"<tool_call>\n{line}\n</tool_call>")
        ids.append(one.get("id"))
    return "\n".join(texts), ids


def result(content, what):
    """The text of what a function gave back.

    Args:
        content: text, content parts, null (nothing), or an object or list,
            which is data here and stays JSON.
        what: its name in messages, such as "turn 3".
    """
    if values.missing(content):
        text = ""
    else:
        try:
            text = values.as_text(content, what)
        except BadRecord:
            if not isinstance(content, (dict, list)):
                raise
            text = json.dumps(content, ensure_ascii=False)
    return f"<tool_response>\n{text.strip()}\n</tool_response>"


def in_order(results, ids, what):
    """The texts of `results` in the order of the calls that they answer.

    Args:
        results: list of (id or None, text) as they came.
        ids: of the calls; where either side names none, the order stays.
        what: of the last result, for messages.

    Raises:
        BadRecord: a result answers no call.
    """
    if None in ids or any(own is None for own, _ in results):
        return [text for _, text in results]
    strange = [own for own, _ in results if own not in ids]
    if strange and ids:
        raise BadRecord(
            f"{what} answers the call {strange[0]!r}, the calls before it are "
            + ", ".join(map(repr, ids))
        )
    if not ids:
        return [text for _, text in results]
    ordered = sorted(results, key=lambda pair: ids.index(pair[0]))
    return [text for _, text in ordered]


def _parsed(value, what):
    """JSON text as what it holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRecord(
            f"{what} is no JSON ({error}): {value[:80]!r}"
        ) from None
