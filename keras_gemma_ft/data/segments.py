"""A segment: a piece of text, or one control token, and whether it is learned.

Also the names of the control tokens of Gemma's vocabularies.
"""

import re
from typing import NamedTuple

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
END = "<end_of_turn>"
# Pieces of Gemma's vocabularies that are no text. The newlines, runs of spaces
# and HTML tags beside them in the vocabulary are text.
CONTROL = re.compile(
    r"<pad>|<eos>|<bos>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>"
    r"|<start_of_turn>|<end_of_turn>|<start_of_image>|<end_of_image>"
)


class Segment(NamedTuple):
    """A text, or the name of one control token.

    Attributes:
        text: the text or the token's name.
        learn: whether its tokens are targets.
        control: whether it is one control token.
    """

    text: str
    learn: bool = False
    control: bool = False
