"""The server's life: its thread, its signals, its end."""

import contextlib
import logging
import signal
import threading
import time

from keras_gemma_ft import runtime
from keras_gemma_ft.serving.answering import Desk
from keras_gemma_ft.serving.endpoint import Endpoint

# Seconds in which what is being said may end, once the server is to stop.
_GRACE = 5


def run(session, cfg, listener):
    """Serves until SIGTERM or Ctrl-C.

    Args:
        session: `chat.Session` of `switching.Loaded`.
        cfg: `config.Config`.
        listener: of `listening.bind`.

    Returns:
        dict: what was done, the verb's result.
    """
    began, desk = time.monotonic(), Desk(session, cfg)
    names, base = [*session.several.ways], session.several.adapters.base
    server = _server(Endpoint(desk, names, base, cfg.generate, cfg.serve.host))
    thread = threading.Thread(
        target=_serve, args=(server, listener, desk), daemon=True
    )
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    with _signals(desk.stop):
        thread.start()
        runtime.say(f"serving {', '.join(names)} at {url}; Ctrl-C ends it")
        desk.run()
        server.should_exit = True
        thread.join(2 * _GRACE)
    if not server.started:
        raise RuntimeError("the server did not start")
    return {
        "status": "done",
        "preset": session.several.ways[base].preset,
        "models": names,
        "url": url,
        **desk.counts,
        "switch_ms": session.several.adapters.milliseconds(),
        "seconds": round(time.monotonic() - began, 2),
    }


def _server(endpoint):
    import uvicorn

    # Requests are told by the desk; their headers and texts are told nowhere.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Server(
        uvicorn.Config(
            endpoint.app(),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=256,
            timeout_graceful_shutdown=_GRACE,
        )
    )


def _serve(server, listener, desk):
    """The thread of the server; without it nobody waits for an answer."""
    try:
        server.run(sockets=[listener])
    finally:
        desk.stop()


@contextlib.contextmanager
def _signals(stop):
    """A block that SIGTERM and Ctrl-C end in order; a second one at once."""
    before = {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        restore()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        restore()
