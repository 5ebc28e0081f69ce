"""Trains the embedded model's tokenizer: Gemma's own layout, 4,096 pieces.

    python -m keras_gemma_ft.embedded.tokenizer --books=FOLDER --output=FILE

SentencePiece BPE with the settings of Gemma's tokenizer: text is taken as it
is (no normalisation, no space put in front, every space and newline kept),
each digit is a piece, and what has no piece is spelled in UTF-8 bytes. The
reserved ids 0-109 are those of Gemma 2, so that whatever writes the turn
format needs no second table:

    0 <pad>   1 <eos>   2 <bos>   3 <unk>   4 <mask>   5 <2mass>   6 [@BOS@]
    7-105 <unused0>-<unused98>   106 <start_of_turn>   107 <end_of_turn>
    108-111 one to four newlines   112-114 two to four spaces
    115-370 the bytes   371-4095 what was learned, the frequent first

(Gemma goes on to 31 newlines and 31 spaces; four do in a small vocabulary.)

The same books and texts give the same file, byte for byte, with the same
release of `sentencepiece`.
"""

import argparse
import io
import itertools
import json
import pathlib
import random
import re
import string
import sys

import sentencepiece

from keras_gemma_ft import embedded
from keras_gemma_ft.embedded import sentences

# The order is the ids: the first of them gets 4, after pad, eos, bos, unk.
RESERVED = (
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    *("\n" * n for n in (1, 2, 3, 4)),
    # SentencePiece writes a space as U+2581 inside a piece.
    *("\u2581" * n for n in (2, 3, 4)),
)

# Trains in two seconds; more text moves the last few pieces only.
_CHARACTERS = 20_000_000

_SLUR = re.compile(r"\bnigg(er|ah)", re.IGNORECASE)


def train_tokenizer(paths, extra_texts, vocabulary_size=4096):
    """Trains a tokenizer as Gemma's.

    Args:
        paths: plain-text UTF-8 files, one paragraph a line. Beyond 20 million
            characters every n-th paragraph is used.
        extra_texts: strings, taken whole, for the pieces that the files lack
            (JSON's punctuation, say).
        vocabulary_size: the number of pieces, reserved and bytes included.

    Returns:
        `bytes`: the SentencePiece model, what KerasHub calls the proto.

    Raises:
        ValueError: where there is no text, or `vocabulary_size` leaves no
            room for learned pieces.
    """
    least = 4 + len(RESERVED) + 256 + len(string.printable)
    if vocabulary_size < least:
        raise ValueError(
            f"vocabulary_size={vocabulary_size} leaves nothing to learn: "
            f"reserved pieces, bytes and ASCII are {least} already."
        )
    paths = sorted(paths)
    paragraphs = _sample(read_paragraphs(paths))
    if not paragraphs:
        raise ValueError(f"There is no text in the {len(paths)} files.")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(paragraphs, extra_texts),
        model_writer=model,
        vocab_size=vocabulary_size,
        **_settings(),
    )
    return model.getvalue()


def _settings():
    """Gemma's settings, by SentencePiece's names."""
    return dict(
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(RESERVED),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        # A letter seen fewer than about 160 times is left to the bytes...
        character_coverage=0.99999,
        # ... but for ASCII, which has pieces whatever the books contain.
        required_chars="".join(
            c for c in string.printable if c.isprintable() and c != " "
        ),
        # The default skips paragraphs above 4,192 bytes.
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )


def read_paragraphs(paths):
    """The paragraphs of plain-text UTF-8 files that have one a line.

    Those with a racial slur, of which old books have some, are left out: it
    would be frequent enough to become a piece.
    """
    texts = [pathlib.Path(path).read_text(encoding="utf-8") for path in paths]
    paragraphs = [p for text in texts for p in text.split("\n") if p.strip()]
    return [p for p in paragraphs if not _SLUR.search(p)]


def _sample(paragraphs):
    """Every n-th paragraph, for `_CHARACTERS` or a little less in all."""
    return paragraphs[:: -(-sum(map(len, paragraphs)) // _CHARACTERS) or 1]


def demo_texts(path):
    """The prompts and responses of a demo file, one after the other."""
    texts = []
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts += [record["prompt"], record["response"]]
    return texts


def number_texts():
    """The number words up to ninety-nine, often enough to become pieces.

    "forty" must not be one piece where "sixty" is three: a model that copies
    numbers into digits would learn two rules for one.
    """
    rng = random.Random(0)
    numbers = [sentences.number_words(n, rng) for n in range(100)] * 100
    return [f"It is {n}, {n}." for n in numbers]


def main(arguments=None):
    """Trains on the books and the demo's training split; writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="folder of .txt files")
    parser.add_argument("--output", required=True, help="the .spm to write")
    options = parser.parse_args(arguments)
    books = sorted(pathlib.Path(options.books).rglob("*.txt"))
    if not books:
        parser.error(f"--books={options.books} has no .txt file in it.")
    extra = demo_texts(embedded.demo_file("train")) + number_texts()
    model = train_tokenizer(books, extra)
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model)
    print(f"{output}: {len(model):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
