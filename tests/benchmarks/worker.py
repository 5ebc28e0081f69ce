"""The process of one contender: does what the parent asks, line by line.

Waits for lines of JSON on stdin and answers each with one on stdout: `build`,
`step` (`burst` optimizer steps: seconds of one, mean loss), `reset` (peak
memory counts from now), `memory`, `quit`, and what the contender adds.
"""

import gc
import importlib
import json
import os
import sys
import time

from tests.benchmarks import memory


class Channel:
    """The line to the parent. What libraries print goes to stderr.

    Attributes:
        device: of `memory.device`.
        commands: {name: function of a request that returns a dict}.
    """

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.device, self.commands = None, {}
        self.idle, self.highest = 0.0, 0

    def answer(self, **values):
        """One line of JSON."""
        print(json.dumps(values), file=self.out, flush=True)

    def wait(self, wanted):
        """Serves commands until `wanted` comes; returns its dict."""
        before = time.process_time()
        for line in iter(sys.stdin.readline, ""):
            # What threads burn while another contender has the cores.
            self.idle += time.process_time() - before
            request = json.loads(line)
            if request["command"] == wanted:
                return request
            self._serve(request)
            before = time.process_time()
        os._exit(0)

    def built(self, **values):
        """Answers `build`."""
        gc.collect()
        memory.trim()
        self.answer(**values, **memory.read(self.device))

    def done(self, clocks, loss):
        """Answers `step`: seconds on the wall and of the cores, the loss."""
        seconds, cpu = map(float, clocks)
        self.answer(seconds=seconds, cpu_seconds=cpu, loss=loss)

    def _serve(self, request):
        name = request["command"]
        if name == "quit":
            os._exit(0)
        found = memory.read(self.device)
        self.highest = max(self.highest, found["peak"])
        if name == "reset":
            gc.collect()
            memory.reset(self.device)
            self.answer(**memory.read(self.device))
        elif name == "memory":
            # Compilation included.
            found["whole_peak"] = self.highest
            self.answer(idle_cpu_s=self.idle, **found)
        else:
            self.answer(**self.commands[name](request))


def main():
    """Runs the contender that argv[1] describes."""
    spec = json.loads(sys.argv[1])
    channel = Channel()
    module = importlib.import_module(f"tests.benchmarks.{spec['module']}")
    try:
        channel.wait("build")
        getattr(module, spec["kind"])(spec, channel)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        channel.answer(error=f"{type(error).__name__}: {first[:300]}")
        raise
    # Frameworks leave threads behind that need no goodbye.
    os._exit(0)


if __name__ == "__main__":
    main()
