"""A verb as a process: flags in, one JSON line out, an exit code."""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import traceback

from keras_gemma_ft import command_line, config
from keras_gemma_ft.runtime import memory, output

DONE, BUG, MISTAKE, RESUMABLE = 0, 1, 2, 75


class Stopped(Exception):
    """The run stopped before its end and can be continued. Exit 75."""

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class Ended(Exception):
    """A process that did our work ended with `status`, and has said why."""

    def __init__(self, result, status):
        super().__init__(f"exit code {status}")
        self.result, self.status = result, status


def main(verb, doc):
    """Runs a verb as a process: flags in, one JSON line out, an exit code.

    Args:
        verb: function of a `Config` that returns the result as a dict; its
            name is the verb's.
        doc: the verb's docstring, for `--help`.

    Everything that is printed on the way goes to stderr, so that the JSON
    object is stdout's last line.
    """
    argv, name = sys.argv[1:], verb.__name__
    if {"--help", "-help", "-h", "--helpfull"} & set(argv):
        every = "--helpfull" in argv
        _show(command_line.help_text(doc, None if every else name))
        sys.exit(DONE)
    memory.restart(memory.allocator())
    signal.signal(signal.SIGTERM, _terminate)
    status, result = BUG, None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            argv = command_line.spelled(argv, name)
            cfg = command_line.from_flags(argv)
            if unread := command_line.unread(argv, name):
                output.say(unread)
            result, status = verb(cfg), DONE
        except config.UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            result, status = {"status": "error", "error": str(error)}, MISTAKE
        except Stopped as stop:
            print(f"Stopped: {stop}", file=sys.stderr)
            result, status = stop.result, RESUMABLE
        except Ended as end:
            result, status = end.result, end.status
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            result, status = {"status": "interrupted"}, RESUMABLE
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            result = {"status": "bug", "error": what}
            if _ABORT and re.search("Gloo|NCCL|oordination ?[Ss]ervice", what):
                # JAX's runtime does not outlive it.
                _aborted()
    print(json.dumps(result, ensure_ascii=False), flush=True)
    _ABORT["ended"] = status
    if "handler" in _ABORT and status != DONE:
        # What JAX has to say of the others would bury the reason.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(status)


def _show(text):
    """Prints `text`, of which a reader such as `head` may take only a part."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try again, and complain, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


_ABORT = {}


def on_abort(message, status):
    """Has abort() end the process with a message, a JSON line and `status`.

    JAX aborts, from a thread of its own, a process whose fellows are gone or
    do not come; no `except` sees that.
    """
    if "handler" not in _ABORT:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
        _ABORT["handler"] = handler  # Kept: C knows its address only.
        # Not signal.signal, whose handlers wait for the main thread.
        ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    _ABORT.update(message=message, status=status)


def _aborted(number=None):
    if "ended" not in _ABORT:
        message, status = _ABORT["message"], _ABORT["status"]
        word = "error" if status == MISTAKE else "stopped"
        line = json.dumps({"status": word, "error": message})
        os.write(2, f"{word.capitalize()}: {message}\n".encode())
        os.write(1, f"{line}\n".encode())
    os._exit(_ABORT.get("ended", _ABORT["status"]))


def _terminate(number, frame):
    """SIGTERM outside of training, where there is nothing to save.

    No exception: what is being imported may swallow it and go on.
    """
    os.write(2, b"Interrupted.\n")
    os.write(1, b'{"status": "interrupted"}\n')
    os._exit(RESUMABLE)
