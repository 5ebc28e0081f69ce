"""A conversation as it is written -> turns: who speaks, what counts.

Understood are lists of {"role", "content"}, ShareGPT's {"from", "value"}, and
either as JSON text, which is how tables hold them.
"""

import itertools
import json
from typing import NamedTuple

from keras_gemma_ft import config
from keras_gemma_ft.data import tools, values
from keras_gemma_ft.data.values import BadRecord

# A speaker's name -> whose turn it is. "call" is a model's turn that calls a
# function, "tool" what the function gave back.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "model",
    "model": "model",
    "gpt": "model",
    "bot": "model",
    "chatgpt": "model",
    "bard": "model",
    "bing": "model",
    "ai": "model",
    "claude": "model",
    "gemini": "model",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


class Turn(NamedTuple):
    """One message.

    Attributes:
        role: "system", "user" or "model".
        text: what is said.
        learn: how much its tokens count as targets; only a model's are any.
    """

    role: str
    text: str
    learn: float = 1.0


def speakers(spec):
    """`ROLES` and what `--data.roles` adds: {name: role}."""
    added = {name: ROLES[role] for name, role in config.roles(spec).items()}
    return {**ROLES, **added}


def listed(content):
    """The list of messages that `content` is or spells; None if it is none.

    A text counts when it is the JSON of a list of messages.
    """
    if isinstance(content, str) and content.lstrip()[:1] == "[":
        try:
            content = json.loads(content)
        except ValueError:
            return None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, (list, tuple)):
        return None
    speaks = [
        isinstance(message, dict) and bool({"role", "from"} & message.keys())
        for message in content
    ]
    return list(content) if any(speaks) else None


def messages(content, roles=ROLES):
    """A list of messages -> list of `Turn`, one for each but for results.

    The results of the calls of one turn are one turn of a user's.

    Args:
        content: list of dicts, or its JSON text.
        roles: {name: role}, from `speakers`.

    Raises:
        BadRecord: it is no such list, a role is unknown, or a turn holds what
            is neither text nor a call.
    """
    known = content if isinstance(content, (list, tuple)) else listed(content)
    if not known:
        kind = type(content).__name__
        raise BadRecord(f"messages must be a list of turns, got {kind}")
    spoken = [
        (f"turn {number}", _role(number, message, roles), message)
        for number, message in enumerate(known, 1)
    ]
    found, ids = [], []
    for results, run in itertools.groupby(spoken, lambda s: s[1] == "tool"):
        if results:
            found.append(_results([*run], ids))
            continue
        for what, role, message in run:
            turn, called = _turn(what, role, message)
            ids = ids if called is None else called
            found.append(turn)
    return found


def _content(message):
    return message.get("content", message.get("value"))


def _results(run, ids):
    """The user's turn that gives the results of the calls `ids`."""
    what, *_ = run[-1]
    results = [
        (
            message.get("tool_call_id"),
            tools.result(_content(message), f"{where}'s text"),
        )
        for where, _, message in run
    ]
    return Turn("user", "\n".join(tools.in_order(results, ids, what)))


def _turn(what, role, message):
    """`(Turn, ids of the calls that it makes)`; None where it cannot call."""
    content = _content(message)
    if role == "model":
        return _models(message, content, what)
    if role == "call":
        text = tools.call(content, what)
        return Turn("model", text, values.weight(message, what)), []
    turn = Turn(role, values.as_text(content, f"{what}'s text"))
    _only_answers_are_learned(message, role, what)
    return turn, None


def _role(number, message, roles):
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise BadRecord(f"turn {number} must be an object, got {kind}")
    role = message.get("role", message.get("from"))
    if isinstance(role, str) and role.lower() in roles:
        return roles[role.lower()]
    raise BadRecord(
        f"turn {number} has role {role!r}, expected one of "
        f"{', '.join(roles)}; or say whose turn that is: "
        f"--data.roles={role}=user (or =assistant, =system)"
    )


def _models(message, content, what):
    """`(Turn, ids of its calls)` of an assistant's message."""
    called, ids = tools.calls(message, what)
    if called and values.empty(content):
        text = called
    else:
        text = values.as_text(content, f"{what}'s text")
        text = f"{text.rstrip()}\n{called}" if called else text
    return Turn("model", text, values.weight(message, what)), ids


def _only_answers_are_learned(message, role, what):
    if "train" in message and values.weight(message, what) > 0:
        raise BadRecord(
            f"{what} is a {role}'s and has train={message['train']!r}; only "
            "the assistant's turns can be learned"
        )


def merge(found):
    """Joins neighbours of one role, with a blank line between their texts.

    Raises:
        BadRecord: two answers in a row of which one is learned more.
    """
    merged = []
    for turn in found:
        if merged and merged[-1].role == turn.role:
            before = merged.pop()
            if turn.role == "model" and turn.learn != before.learn:
                raise BadRecord(
                    "two answers in a row have the weights "
                    f"{before.learn:g} and {turn.learn:g}, expected one weight"
                )
            turn = turn._replace(text=f"{before.text}\n\n{turn.text}")
        merged.append(turn)
    return merged


def as_context(found):
    """The same turns, none of them learned."""
    return [turn._replace(learn=0.0) for turn in found]


def answered(found, counts):
    """What can be learned: greetings are context, unanswered ends go.

    Args:
        found: list of `Turn`, merged.
        counts: `collections.Counter` of what became of the turns.

    Raises:
        BadRecord: nobody speaks but the assistant.
    """
    roles = [turn.role for turn in found]
    if roles and not {"user", "system"} & set(roles):
        raise BadRecord("there is no turn before the assistant's")
    # Without a user there is the system's text alone to answer to.
    first = roles.index("user") if "user" in roles else 0
    greetings = [i for i in range(first) if roles[i] == "model"]
    counts["greetings, not learned"] += len(greetings)
    found = [
        turn._replace(learn=0.0) if i in greetings else turn
        for i, turn in enumerate(found)
    ]
    while found and found[-1].role != "model":
        counts["turns after the last answer, left out"] += 1
        found.pop()
    return found
