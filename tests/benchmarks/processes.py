"""Contenders, each in its own process, that answer lines of JSON."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time

from keras_gemma_ft import runtime

ROOT = pathlib.Path(__file__).parents[2]


class Failed(Exception):
    """The worker died, raised, or took more memory than it may."""


class Worker:
    """One contender in its own process, idle until it is asked.

    Args:
        name: for tables and messages.
        spec: dict, given to the process as JSON: `module` and `kind` name
            the function that is the contender, `backend` its backend.
        limit: bytes of resident memory above which the process is killed;
            0 is no limit.
        deadline: `time.monotonic()` after which it is; None is never.
    """

    def __init__(self, name, spec, *, limit=0, deadline=None):
        self.name, self.limit, self.deadline = name, limit, deadline
        self.error, self.too_large, self.built = None, False, None
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.worker", json.dumps(spec)],
            cwd=ROOT,
            env={**os.environ, **_environment(spec)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def build(self):
        """Has the contender made; `built` is then what it says of itself."""
        self.built = self.attempt("build")

    def ask(self, command, **arguments):
        """Sends a command, waits, returns the answer as a dict.

        Raises:
            Failed: and from then on always.
        """
        if self.error:
            raise Failed(self.error)
        line = json.dumps({"command": command, **arguments}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail("it ended by itself")
        answer = self._answer()
        if "error" in answer:
            self._fail(answer["error"])
        return answer

    def attempt(self, command, **arguments):
        """As `ask`; None, said once, where it fails."""
        if self.error:
            return None
        try:
            return self.ask(command, **arguments)
        except Failed as error:
            say(f"{self.name}: {error}")
            return None

    def _answer(self):
        pipe = self.process.stdout
        while not select.select([pipe], [], [], 0.1)[0]:
            self._watch()
        self._watch()
        line = pipe.readline()
        if not line:
            code = self.process.wait()
            self._fail(f"ended with exit code {code}")
        return json.loads(line)

    def _watch(self):
        """Ends a process before it fills the machine."""
        now = memory_line(self.process.pid, "VmRSS")
        if self.limit and now > self.limit:
            self.too_large = True
            self._fail(f"does not fit in {self.limit / 2**30:.1f} GiB")
        if self.deadline and time.monotonic() > self.deadline:
            self._fail("out of time")

    def _fail(self, why):
        self.error = why
        self.close()
        if not self.too_large:
            self.log.seek(0)
            say("".join(self.log.readlines()[-12:]))
        raise Failed(why)

    def close(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def _environment(spec):
    """Of a worker: its backend, quiet, no memory taken that is not used.

    Ours runs with the allocator that our commands set.
    """
    ours = runtime.allocator() if spec.get("kind") == "ours" else {}
    return {
        **ours,
        "KERAS_BACKEND": spec.get("backend") or "torch",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **spec.get("environment", {}),
    }


def memory_line(pid, name):
    """VmRSS or VmHWM of /proc/PID/status in bytes; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def tidy():
    """Lets SIGTERM end this process as an exception does: with clean-up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))


def say(text):
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def table(head, rows):
    """Prints columns: the first to the left, the others to the right."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [c.rjust(w) for c, w in zip(others, widths[1:])]
        say("  ".join([first.ljust(widths[0]), *cells]))
