"""Text records: learned whole, unless they spell control tokens.

Many public sets are conversations that were rendered already:

    <bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n...

Taken as text, each mark is a dozen ordinary characters, and what is learned
looks right in print and is wrong in its ids. Only the user knows which is
meant: `--data.text_marks`.
"""

import re

from keras_gemma_ft.data.segments import BOS, CONTROL, END, EOS, START, Segment
from keras_gemma_ft.data.segments import split as split_marks
from keras_gemma_ft.data.values import BadRecord, NeedsChoice

_MODEL = "model\n"


def render(text, weight, *, marks, learn, control=CONTROL):
    """One text -> its segments, `<bos>` first, and an end.

    Args:
        text: str.
        weight: how much its tokens count.
        marks: what spelled control tokens are: "stop", "parse" or "literal".
        learn: "all", or "answers": of the model's turns only.
        control: pattern of the names of control tokens.

    Returns:
        List of `Segment`. `<eos>` ends it unless a parsed end stands there.

    Raises:
        NeedsChoice: `marks` is "stop" and there is one.
        BadRecord: parsed, and a turn is nobody's, or a `<bos>` is inside.
    """
    weight = weight if text.strip() else 0.0
    found = control.search(text)
    if found and marks == "stop":
        raise NeedsChoice(
            f"the text spells the control token {found[0]}. Is it that token? "
            "Type --data.text_marks=parse (and --data.learn=answers to learn "
            "the model's turns only). Is it text about such tokens? Type "
            "--data.text_marks=literal."
        )
    if marks == "parse":
        return _parse(text, weight, learn, control)
    return [
        Segment(BOS, control=True),
        Segment(text, weight),
        Segment(EOS, weight, control=True),
    ]


def _parse(text, weight, learn, names):
    text = re.sub(rf"^\s*(?:{re.escape(BOS)})+", "", text)
    segments, opened, answering = [], False, False

    def add(text, learned, control=False):
        if text:
            segments.append(Segment(text, weight * learned, control))

    everything = learn == "all"
    for segment in split_marks(text, control=names):
        name = segment.text if segment.control else ""
        if name == BOS:
            raise BadRecord(
                f"{BOS} stands inside the text: a record is one text, write "
                "the next one as a record of its own"
            )
        if opened and (name or not re.match(r"(user|model)\n", segment.text)):
            raise BadRecord(
                f"{START} is followed by {segment.text[:20]!r}, expected "
                "user or model and a new line"
            )
        if opened and segment.text.startswith(_MODEL):
            # Alone, as before an answer that is generated.
            add(_MODEL, everything)
            answering = True
            add(segment.text.removeprefix(_MODEL), True)
        else:
            add(segment.text, everything or answering, segment.control)
        opened = name == START
        answering = answering and name not in (END, EOS)
    if not _ended(segments):
        add(EOS, everything or answering, control=True)
    return [Segment(BOS, control=True), *segments]


def _ended(segments):
    """Whether the last that is no white space is an end token."""
    told = [s for s in segments if s.control or s.text.strip()]
    return bool(told) and told[-1].control and told[-1].text in (END, EOS)
