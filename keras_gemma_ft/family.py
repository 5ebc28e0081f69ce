"""Processes of one machine that were started together, and how they end.

Signals go to all of them; where one ends early, the others end soon after, and
what it said is told. Nothing here imports a framework.
"""

import json
import os
import signal
import sys
import threading
import time

from keras_gemma_ft import runtime

# Seconds that the others have to end by themselves once one has ended early.
GRACE = 20
# Set for a process that another one has started and keeps the stdin of.
STARTED = "KERAS_GEMMA_FT_STARTED"


class Family:
    """Processes that were started together; the first of them speaks.

    Args:
        folder: for what they print.
    """

    def __init__(self, folder):
        self.folder = folder
        self.members, self.ended, self.signals = [], [], []

    def note(self, number, frame):
        """A signal's handler: what comes to us is for all of them."""
        self.signals.append(number)

    def start(self, command, environment):
        """Starts one more; only the first one's stderr is seen."""
        import subprocess

        local = len(self.members)
        with (
            open(self.folder / f"{local}.out", "wb") as out,
            open(self.folder / f"{local}.err", "wb") as err,
        ):
            process = subprocess.Popen(
                command,
                env=environment,
                # See `watch`: it ends when we do, however we end.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=None if local == 0 else err,
                # A terminal's Ctrl-C would come twice.
                start_new_session=True,
            )
        self.members.append(process)

    def wait(self):
        """Waits until all have ended, or `GRACE` after one failed."""
        limit = None
        while len(self.ended) < len(self.members):
            time.sleep(0.05)
            while self.signals:
                number = self.signals.pop(0)
                for process in self.members:
                    process.send_signal(number)
            seen = [i for i, _ in self.ended]
            for i, process in enumerate(self.members):
                if i not in seen and process.poll() is not None:
                    self.ended.append((i, process.returncode))
            if limit is None and any(code for _, code in self.ended):
                limit = time.monotonic() + GRACE
            if limit is not None and time.monotonic() > limit:
                return

    def kill(self):
        """Ends those that are still there."""
        for process in self.members:
            process.kill()
            process.wait()
            process.stdin.close()

    def _told(self, local):
        """The JSON object of a process's last line; None without one."""
        lines = (self.folder / f"{local}.out").read_text("utf-8").splitlines()
        try:
            return json.loads(lines[-1])
        except (IndexError, ValueError):
            return None

    def result(self):
        """What the first that failed has said, else the first of all."""
        first = self._told(0)
        early = [pair for pair in self.ended if pair[1] != runtime.DONE]
        if not early and len(self.ended) == len(self.members):
            return first
        worse = [pair for pair in early if pair[1] != runtime.RESUMABLE]
        local, code = (worse or early)[0]
        told = self._told(local)
        if local and worse and told != first:
            # Nobody has seen what it said.
            text = (self.folder / f"{local}.err").read_text("utf-8", "replace")
            sys.stderr.write(f"process {local} said:\n{text[-4000:]}")
        if code < 0:
            message = (
                f"process {local} was ended by {signal.Signals(-code).name}. "
                f"The same command goes on from the last checkpoint."
            )
            told = {"status": "stopped", "error": message}
            raise runtime.Stopped(message, told)
        raise runtime.Ended(told if worse else first or told, code)


def watch():
    """Ends this process with the one that started it, if one did.

    Its end closes our standard input, even where it was killed.
    """
    if not os.environ.pop(STARTED, ""):
        return

    def wait():
        while os.read(0, 1024):
            pass
        os._exit(runtime.RESUMABLE)

    threading.Thread(target=wait, daemon=True).start()
