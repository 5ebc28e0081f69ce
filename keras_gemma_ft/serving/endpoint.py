"""The HTTP side: routes, bodies, server-sent events, clients that go away."""

import asyncio
import contextlib
import json
import time

from keras_gemma_ft.serving import replies, requests
from keras_gemma_ft.serving.answering import Ended, Job
from keras_gemma_ft.serving.listening import is_loopback
from keras_gemma_ft.serving.requests import Refused

# Bytes of a request's body; 4096 tokens are about 16 KB.
MOST_BYTES = 4 * 2**20
# Seconds in which a body must have come.
_PATIENCE = 60
# What a proxy calls a client that has closed the connection.
_CLOSED = 499


class Endpoint:
    """The routes of the server.

    Args:
        desk: `answering.Desk`.
        names: the models, the one that answers where none is named first.
        base: the name among them that is no adapter.
        defaults: `config.Generate`.
        host: the address that is listened at.
    """

    def __init__(self, desk, names, base, defaults, host):
        self.desk, self.names, self.base = desk, names, base
        self.defaults, self.host = defaults, host
        self.started = int(time.time())

    def app(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        get, post = ["GET"], ["POST"]
        return Starlette(
            routes=[
                Route("/health", self.health, methods=get),
                Route("/v1/models", self.models, methods=get),
                Route("/v1/models/{name:path}", self.model, methods=get),
                Route("/v1/chat/completions", self.chat, methods=post),
                Route("/v1/completions", self.text, methods=post),
            ],
            exception_handlers={
                Refused: self.refused,
                HTTPException: self.not_there,
            },
        )

    async def health(self, request):
        """GET /health."""
        return _json({"status": "ok", "waiting": self.desk.waiting})

    async def models(self, request):
        """GET /v1/models."""
        data = [self._model(name) for name in self.names]
        return _json({"object": "list", "data": data})

    async def model(self, request):
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in self.names:
            raise Refused(
                404,
                f"The model {name!r:.100} does not exist here. There are: "
                f"{', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        return _json(self._model(name))

    async def chat(self, request):
        """POST /v1/chat/completions."""
        return await self._complete(request, chat=True)

    async def text(self, request):
        """POST /v1/completions: the text is completed as it is."""
        return await self._complete(request, chat=False)

    async def refused(self, request, refused):
        """What a client did wrong, in OpenAI's form."""
        return _json(replies.error(refused), refused.status)

    async def not_there(self, request, error):
        """A path or a method that does not exist, in OpenAI's form."""
        told = (
            f"{request.method} {request.url.path!r:.100} is not here. There "
            "are POST /v1/chat/completions, POST /v1/completions, GET "
            "/v1/models and GET /health."
        )
        return _json(
            replies.error(Refused(error.status_code, told)),
            error.status_code,
            error.headers,
        )

    def _model(self, name):
        return replies.model(name, self.base, self.started)

    async def _complete(self, request, *, chat):
        from starlette.responses import Response, StreamingResponse

        _check_source(request.headers, self.host)
        asked = requests.read(
            await _body(request),
            chat=chat,
            models=self.names,
            defaults=self.defaults,
        )
        events, loop = asyncio.Queue(), asyncio.get_running_loop()

        def tell(event):
            # The loop is closed where the server ended before an answer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        job, reply = Job(asked, tell), replies.Reply(asked)
        self.desk.submit(job)
        async with _watched(request, job, events):
            if not asked.stream:
                whole = await _whole(events, reply)
                return _json(whole) if whole else Response(status_code=_CLOSED)
            # What is refused after the queue still has a status of its own.
            first = await _next(events)
        return StreamingResponse(
            _stream(first, job, events, reply), media_type="text/event-stream"
        )


async def _next(events):
    """The next event; a refusal is raised, None is a client that has gone."""
    event = await events.get()
    if isinstance(event, Refused):
        raise event
    return event


async def _whole(events, reply):
    """The object of an answer that is not streamed; None if nobody waits."""
    pieces = []
    while isinstance(event := await _next(events), str):
        pieces.append(event)
    return event and reply.whole("".join(pieces), event)


async def _stream(event, job, events, reply):
    """Server-sent events of an answer, from its first event on."""
    first = True
    try:
        while isinstance(event, str):
            yield replies.event(reply.piece(event, first=first))
            first, event = False, await events.get()
        if isinstance(event, Ended):
            if first:
                yield replies.event(reply.piece("", first=True))
            yield replies.event(reply.piece("", reason=event.reason))
            if job.asked.usage:
                yield replies.event(reply.usage(event))
            yield replies.event("[DONE]")
        elif isinstance(event, Refused):
            yield replies.event(replies.error(event))
    finally:
        # Also where the client has closed the stream.
        job.gone.set()


@contextlib.asynccontextmanager
async def _watched(request, job, events):
    """A block in which a client that closes the connection ends its job."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.gone.set()
        events.put_nowait(None)

    task = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        job.gone.set()
        raise
    finally:
        task.cancel()


async def _body(request):
    """The JSON of a request's body, which is bounded."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        # A web page elsewhere cannot send this type without being asked.
        raise Refused(
            415, f"Content-Type is {kind!r:.60}, expected application/json."
        )
    data = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise Refused(413, f"The body is above {MOST_BYTES} bytes.")
    except TimeoutError:
        raise Refused(408, f"No body came in {_PATIENCE} s.") from None
    try:
        found = json.loads(data)
        # Lone halves of surrogate pairs are no text.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is no JSON: {error!s:.200}") from None
    return found


def _check_source(headers, host):
    """Refuses a web page that gave this machine a name of its own.

    Where only this machine is listened to, it is called by its own names.
    """
    if not is_loopback(host):
        return
    name = headers.get("host", "")
    name = name.rpartition("]")[0][1:] or name.partition(":")[0]
    if not is_loopback(name):
        raise Refused(403, f"The host is {name!r:.100}, expected localhost.")


def _json(value, status=200, headers=None):
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, headers)
