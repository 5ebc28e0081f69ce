"""Answers in the JSON forms of OpenAI's HTTP API."""

import json
import time
import uuid


class Reply:
    """The JSON objects that answer one request.

    Args:
        asked: `requests.Asked`.
    """

    def __init__(self, asked):
        self.asked = asked
        self.kind = "chat.completion" if asked.chat else "text_completion"
        name = "chatcmpl" if asked.chat else "cmpl"
        self.head = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, text, ended):
        """The one object of an answer that is not streamed.

        Args:
            text: all that is said.
            ended: `answering.Ended`.
        """
        if self.asked.chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = _choice(ended.reason, message=message)
        else:
            choice = _choice(ended.reason, text=text)
        return {
            **self.head,
            "object": self.kind,
            "choices": [choice],
            "usage": _usage(ended),
        }

    def piece(self, text, *, first=False, reason=None):
        """An object of a stream: more text, or why there is no more."""
        if not self.asked.chat:
            return self._part(_choice(reason, text=text))
        delta = {"content": text} if text or first else {}
        if first:
            delta = {"role": "assistant", **delta}
        return self._part(_choice(reason, delta=delta))

    def usage(self, ended):
        """The object that ends a stream whose client wants the counts."""
        return {**self._part(), "usage": _usage(ended)}

    def _part(self, *choices):
        kind = f"{self.kind}.chunk" if self.asked.chat else self.kind
        return {**self.head, "object": kind, "choices": [*choices]}


def event(value):
    """A server-sent event: an object, or the text that ends a stream.

    Characters beyond ASCII are escaped: some readers of streams take U+2028
    for the end of a line.
    """
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n"


def error(refused):
    """The body of a `requests.Refused`."""
    return {
        "error": {
            "message": str(refused),
            "type": refused.kind,
            "param": refused.param,
            "code": refused.code,
        }
    }


def model(name, base, created):
    """A model that is served; an adapter names its base as its parent."""
    told = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "keras_gemma_ft",
    }
    return told if name == base else {**told, "parent": base}


def _choice(reason, **said):
    return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def _usage(ended):
    return {
        "prompt_tokens": ended.asked,
        "completion_tokens": ended.said,
        "total_tokens": ended.asked + ended.said,
    }
