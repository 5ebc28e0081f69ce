"""The queue of requests, and the one who answers them, each in turn.

The model is used by the main thread alone, as everywhere else; requests come
from the thread of the server, and what is said goes back to it.
"""

import contextlib
import itertools
import queue
import threading
import time
import traceback
from typing import NamedTuple

from keras_gemma_ft import config, runtime
from keras_gemma_ft.inference import sampling
from keras_gemma_ft.serving.requests import Refused
from keras_gemma_ft.serving.text import Words

# Samplers take seeds of 31 bits.
_SEEDS = 2**31


class Ended(NamedTuple):
    """How an answer ended.

    Attributes:
        reason: "stop", or "length" where it was cut.
        asked, said: tokens of the prompt and of the answer.
    """

    reason: str
    asked: int
    said: int


class Job:
    """A request that waits or is answered.

    Args:
        asked: `requests.Asked`.
        tell: function that hands an event to the one who asked: a str, more
            text; at last `Ended` or `Refused`.
    """

    def __init__(self, asked, tell):
        self.asked, self.tell = asked, tell
        # Set by the one who asked, when nobody listens any more.
        self.gone = threading.Event()


class Desk:
    """Answers jobs in the order of their coming.

    Args:
        session: `chat.Session` of several, or of one, that takes turns.
        cfg: `config.Config`; its generate and serve sections and the seed.
    """

    def __init__(self, session, cfg):
        self.session, self.cfg = session, cfg
        self.counts = {
            "requests": 0,
            "cancelled": 0,
            "failed": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        self.waiting, self.stopping = 0, False
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # Its put is safe in a signal's handler, which queue.Queue's is not.
        self._jobs = queue.SimpleQueue()

    def submit(self, job):
        """Queues a job.

        Raises:
            Refused: too many wait, or the server ends.
        """
        with self._lock:
            if self.stopping:
                raise _ending()
            if self.waiting > self.cfg.serve.queue:
                raise Refused(
                    429,
                    f"{self.waiting} requests wait already; one is answered "
                    "at a time. Try again later.",
                    code="rate_limit_exceeded",
                    kind="rate_limit_error",
                )
            self.waiting += 1
            # Within the lock: what is queued after `run` has ended waits.
            self._jobs.put(job)

    def stop(self):
        """Ends `run`, after the token that is being chosen."""
        self.stopping = True
        self._jobs.put(None)

    def run(self):
        """Answers until `stop`; whoever waits then is told that it ends."""
        while not self.stopping:
            job = self._jobs.get()
            if job is not None:
                self._serve(job)
        with self._lock, contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.tell(_ending())

    def _serve(self, job):
        """One job, and whatever goes wrong with it."""
        began = time.monotonic()
        try:
            ended = None if job.gone.is_set() else self._answer(job)
            if self.stopping:
                raise _ending()
            told = ended
            if job.gone.is_set():
                self.counts["cancelled"] += 1
            else:
                self.counts["requests"] += 1
        except Refused as refused:
            told = refused
        except config.UserError as mistake:
            told = Refused(400, str(mistake))
        except Exception as bug:
            traceback.print_exc()
            self.counts["failed"] += 1
            told = Refused(
                500, f"a bug: {type(bug).__name__}", kind="server_error"
            )
        finally:
            with self._lock:
                self.waiting -= 1
        if isinstance(told, Ended):
            runtime.say(
                f"{job.asked.model}: {told.asked} + {told.said} tokens in "
                f"{time.monotonic() - began:.1f} s, "
                + ("cancelled" if job.gone.is_set() else told.reason)
            )
        job.tell(told)

    def _answer(self, job):
        """Says the answer piece by piece; `Ended`."""
        asked, words = job.asked, self._words(job.asked)
        self.session.use(asked.model)
        ids = self.session.ids(asked.question, raw=not asked.chat)
        limit = self._limit(asked, len(ids))

        def heard(row, id):
            piece = words.add(id)
            if piece:
                job.tell(piece)
            return words.stopped or self.stopping or job.gone.is_set()

        seed = self.cfg.seed + next(self._numbers)
        if asked.seed is not None:
            seed = asked.seed
        [said] = self.session.generator.complete(
            [ids],
            limit=limit,
            on_token=heard,
            choose=sampling.chooser(asked.settings, seed % _SEEDS),
        )
        if rest := words.rest():
            job.tell(rest)
        self.counts["prompt_tokens"] += len(ids)
        self.counts["completion_tokens"] += len(said)
        cut = len(said) == limit and not words.stopped
        return Ended("length" if cut else "stop", len(ids), len(said))

    def _words(self, asked):
        return Words(self.session.tokenizer.decode, asked.stop)

    def _limit(self, asked, prompt):
        """Most tokens of the answer to a prompt of so many."""
        most = self.cfg.serve.context
        room = most - prompt
        wanted = asked.limit or min(self.cfg.generate.max_new_tokens, room)
        if room < 1 or wanted > room:
            raise Refused(
                400,
                f"This server takes {most} tokens of prompt and answer "
                f"together (--serve.context). The prompt has {prompt}"
                + (f", and {asked.limit} more are wanted." if asked.limit
                   else "."),
                param="messages" if asked.chat else "prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        return wanted


def _ending():
    return Refused(503, "The server ends.", kind="server_error")
