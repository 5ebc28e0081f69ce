"""What a run says to the person who watches."""

import sys
import time

_START = time.monotonic()


def say(text):
    """One line for the person who watches, on stderr, with the time."""
    if not say.quiet:
        print(f"[{time.monotonic() - _START:6.1f}s] {text}", file=sys.stderr)


say.quiet = False  # Of many processes, one speaks.
