"""Text that comes token by token, and ends before a stop text."""


class Words:
    """What of an answer may be shown so far.

    Half a character waits for its other half, and what may be the beginning
    of a stop text waits until it is known.

    Args:
        decode: function of a list of token ids that returns their text.
        stops: texts before which the answer ends.
    """

    def __init__(self, decode, stops=()):
        self.decode, self.stops = decode, stops
        self.ids, self.shown, self.stopped = [], 0, False

    def add(self, id):
        """The text that one more token lets be shown; often "" ."""
        self.ids.append(id)
        text = self.decode(self.ids)
        whole = text.rstrip("\ufffd")
        at = self._stop(text)
        if at is not None:
            self.stopped = True
            return self._upto(text, at)
        return self._upto(whole, len(whole) - self._begun(whole))

    def rest(self):
        """What is left at the end: of a stop text, or a character, begun."""
        text = self.decode(self.ids)
        return "" if self.stopped else self._upto(text, len(text))

    def _stop(self, text):
        """Where the first stop text begins, or None."""
        found = [text.find(stop, self.shown) for stop in self.stops]
        return min((at for at in found if at >= 0), default=None)

    def _begun(self, text):
        """How many characters at the end may begin a stop text."""
        return max(
            (
                n
                for stop in self.stops
                for n in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:n])
            ),
            default=0,
        )

    def _upto(self, text, end):
        end = max(end, self.shown)
        piece, self.shown = text[self.shown : end], end
        return piece
