"""A segment is a piece of text or a control token, learned or not.

Also the names of the control tokens of Gemma's vocabularies.
"""

import re
from typing import NamedTuple

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
START, END = "<start_of_turn>", "<end_of_turn>"
# Pieces of Gemma's vocabularies that are no text. The newlines, runs of spaces
# and HTML tags beside them in the vocabulary are text.
CONTROL = re.compile(
    r"<pad>|<eos>|<bos>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>"
    r"|<start_of_turn>|<end_of_turn>|<start_of_image>|<end_of_image>"
)


def pattern(names):
    """`CONTROL`, and the names of a vocabulary's further control tokens."""
    more = {name for name in names if not CONTROL.fullmatch(name)}
    if not more:
        return CONTROL
    # The longest first: a name may be the beginning of another.
    escaped = map(re.escape, sorted(more, key=len, reverse=True))
    return re.compile("|".join([*escaped, CONTROL.pattern]))


class Segment(NamedTuple):
    """A text, or the name of one control token.

    Attributes:
        text: the text or the token's name.
        learn: how much its tokens count as targets; 0 is not at all.
        control: whether it is one control token.
    """

    text: str
    learn: float = 0.0
    control: bool = False


def split(text, learn=0.0, control=CONTROL):
    """A text that may name control tokens -> its segments."""
    found, start = [], 0
    for match in control.finditer(text):
        found.append(Segment(text[start : match.start()], learn))
        found.append(Segment(match[0], learn, control=True))
        start = match.end()
    found.append(Segment(text[start:], learn))
    return [segment for segment in found if segment.text]
