"""What can be said before a model is loaded: libraries, address and port."""

import ipaddress
import socket

from keras_gemma_ft import config, runtime
from keras_gemma_ft.runtime import packages

_NEEDED = ("starlette", "uvicorn")


def check():
    """Refuses to begin without the libraries of the extra `serve`."""
    missing = [name for name in _NEEDED if not packages.installed(name)]
    if missing:
        raise config.UserError(
            f"serve needs {' and '.join(missing)}. Type: pip install "
            "'keras_gemma_ft[serve]'"
        )


def bind(settings):
    """The socket of `config.Serve`, which nobody can connect to yet.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    host, port = settings.host, settings.port
    try:
        kind, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as error:
        raise config.UserError(
            f"--serve.host={host} --serve.port={port}: {error.strerror}. "
            "Name another port, or --serve.port=0 for any that is free."
        ) from None
    if not is_loopback(host):
        runtime.say(
            f"warning: --serve.host={host} lets other machines in; nobody is "
            "asked for a password, and nothing is encrypted"
        )
    return found


def is_loopback(host):
    """Whether an address or a name is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
