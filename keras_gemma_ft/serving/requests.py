"""Bodies of OpenAI's HTTP API -> what is asked, or why it is refused.

A field that would change the answer is used or refused, never passed over.
"""

import dataclasses
import math
from typing import NamedTuple

from keras_gemma_ft import config

# Fields that say nothing about the answer.
_PASSED = frozenset(
    "user metadata store service_tier parallel_tool_calls safety_identifier "
    "prompt_cache_key prompt_cache_retention".split()
)
# Fields that are taken where they ask for nothing.
_IDLE = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
}
_USED = frozenset(
    "model max_tokens max_completion_tokens temperature top_p stop seed "
    "stream stream_options".split()
)
_OWN = {True: frozenset({"messages", "tools"}), False: frozenset({"prompt"})}
_MOST_STOPS = 4


class Refused(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: a sentence.
        param: the field that it is about, or None.
        code: OpenAI's word for it, or None.
        kind: OpenAI's type of the error.
    """

    def __init__(
        self,
        status,
        message,
        *,
        param=None,
        code=None,
        kind="invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.param = status, param
        self.code, self.kind = code, kind


class Asked(NamedTuple):
    """One request, checked.

    Attributes:
        model: a name of the models that are served.
        question: what `chat.Session.ids` takes.
        chat: whether it is a conversation; else a text to go on with.
        settings: `config.Generate`: how words are chosen.
        limit: most tokens of the answer; None is as many as the server gives.
        seed: of the sampler; None is the server's own.
        stop: texts before which the answer ends.
        stream: whether it is told as it comes.
        usage: whether a stream ends with the counts of tokens.
    """

    model: str
    question: object
    chat: bool
    settings: config.Generate
    limit: int | None = None
    seed: int | None = None
    stop: tuple = ()
    stream: bool = False
    usage: bool = False


def read(body, *, chat, models, defaults):
    """`Asked` of a request's body.

    Args:
        body: what its JSON holds.
        chat: whether it came to /v1/chat/completions.
        models: names that are served; the first answers where none is named.
        defaults: `config.Generate` of what the request does not say.

    Raises:
        Refused: every offence is in the message.
    """
    if type(body) is not dict:
        raise Refused(400, "expected a JSON object as the request's body.")
    # null is how clients write what they do not ask for.
    body = {name: value for name, value in body.items() if value is not None}
    wrong = [*_surplus(body, chat), *_offences(body, chat)]
    if wrong:
        params = [param for param, _ in wrong]
        told = " ".join(f"{param}: {said}" for param, said in wrong)
        raise Refused(400, told, param=params[0], code="invalid_value")
    model = body.get("model", models[0])
    if model not in models:
        raise Refused(
            404,
            f"The model {model!r:.100} does not exist here. There are: "
            f"{', '.join(models)}.",
            param="model",
            code="model_not_found",
        )
    stop = body.get("stop", [])
    return Asked(
        model=model,
        question=_question(body, chat),
        chat=chat,
        settings=_choice(body, defaults),
        limit=body.get("max_completion_tokens", body.get("max_tokens")),
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=body.get("stream", False),
        usage=body.get("stream_options", {}).get("include_usage", False),
    )


def _surplus(body, chat):
    """(field, what is wrong) of fields that nothing here follows."""
    known = _USED | _OWN[chat] | _PASSED | _IDLE.keys()
    for name, value in body.items():
        if name not in known:
            near = config.did_you_mean(name, sorted(_USED | _OWN[chat]))
            yield name[:60], f"is not supported here.{near}"
        elif name in _IDLE and not _is_one_of(value, _IDLE[name]):
            taken = " or ".join(map(repr, _IDLE[name]))
            yield name, f"{value!r:.60} is not supported, only {taken}."


def _offences(body, chat):
    """(field, what is wrong) of fields with values of no use."""
    expected = {
        "model": (lambda v: type(v) is str, "a model's name"),
        "temperature": (_number(0, 100), "a number from 0 on"),
        "top_p": (_number(0, 1), "a number from 0 to 1"),
        "max_tokens": (_whole(1), "a whole number from 1 on"),
        "max_completion_tokens": (_whole(1), "a whole number from 1 on"),
        "seed": (_whole(-math.inf), "a whole number"),
        "stream": (lambda v: type(v) is bool, "true or false"),
        "stream_options": (_is_options, '{"include_usage": true or false}'),
        "stop": (_is_stop, f"a text, or up to {_MOST_STOPS} of them"),
        "tools": (lambda v: type(v) is list, "a list of tools"),
    }
    for name, (good, what) in expected.items():
        if name in body and not good(body[name]):
            yield name, f"{body[name]!r:.60} given, expected {what}."
    limits = {body.get("max_tokens"), body.get("max_completion_tokens")}
    if len(limits - {None}) > 1:
        yield "max_tokens", "differs from max_completion_tokens; give one."
    if "stream_options" in body and body.get("stream") is not True:
        yield "stream_options", "is for stream=true."
    if chat:
        messages = body.get("messages")
        if type(messages) is not list or not messages:
            yield "messages", "expected a list of messages."
    elif not isinstance(_prompt(body), str):
        yield "prompt", "expected one text."


def _is_one_of(value, taken):
    """Whether a value is one of some, 1 not being true."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool)
        for other in taken
    )


def _number(least, most):
    def good(value):
        return type(value) in (int, float) and least <= value <= most

    return good


def _whole(least):
    return lambda value: type(value) is int and value >= least


def _is_options(value):
    return (
        type(value) is dict
        and value.keys() <= {"include_usage", "include_obfuscation"}
        and all(type(switch) is bool for switch in value.values())
    )


def _is_stop(value):
    texts = value if type(value) is list else [value]
    return len(texts) <= _MOST_STOPS and all(
        type(text) is str and text for text in texts
    )


def _prompt(body):
    """The text to go on with; a list of one is taken as it."""
    prompt = body.get("prompt")
    alone = isinstance(prompt, list) and len(prompt) == 1
    return prompt[0] if alone else prompt


def _question(body, chat):
    if not chat:
        return _prompt(body)
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return body["messages"]
    return {"messages": body["messages"], "tools": tools}


def _choice(body, defaults):
    """The sampler that a request asks for, as `config.Generate`.

    A temperature or top_p of 0 is the likeliest word. What the request leaves
    out is the server's, whose own top_p holds if it samples by it, else 1.
    """
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is None and top_p is None:
        return defaults
    if temperature == 0 or top_p == 0:
        return dataclasses.replace(defaults, sampler="greedy")
    sampler = defaults.sampler
    if sampler == "greedy" or top_p is not None:
        sampler = "top_p"
    if top_p is None:
        top_p = defaults.top_p if defaults.sampler == "top_p" else 1.0
    return dataclasses.replace(
        defaults,
        sampler=sampler,
        temperature=float(
            defaults.temperature if temperature is None else temperature
        ),
        top_p=float(top_p),
    )
