"""Segments -> token ids and which of them are learned; cutting and dropping.

Letters: n tokens of an example, T the row's length. An example of n ids fills
n - 1 places of a row: inputs ids[:-1], targets ids[1:].
"""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data.segments import BOS, CONTROL, END, EOS, PAD, pattern

EMPTY = "no answer, an empty one, or one of weight 0"
TOO_LONG = "its answer begins after sequence_length"


class Tokenizer:
    """A SentencePiece vocabulary in which text never becomes a control token.

    Gemma's `<start_of_turn>`, `<unused0>` and the like are user-defined
    pieces, which SentencePiece finds in any text. Here they are control pieces
    of a copy of the model: their ids are reached by name alone.

    Args:
        proto: bytes of a SentencePiece model (vocabulary.spm).
        stops: ids that end an answer, beside <eos> and <end_of_turn>.
        named: {"eos_token": ...}: what a chat template may call tokens.

    Attributes:
        proto, named: as they were given.
        control: pattern of the names of the control tokens.
        stops: frozenset of the ids that end an answer.
        foreign: whether they or the names are others than Gemma's.

    Raises:
        UserError: `proto` is no SentencePiece model.
    """

    def __init__(self, proto, *, stops=(), named=None):
        # The verbs that need no text should not pay for these.
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(proto)
        except DecodeError as error:
            raise UserError(
                f"The vocabulary ({len(proto)} bytes) is no SentencePiece "
                "model. Is vocabulary.spm or tokenizer.model complete?"
            ) from error
        for piece in model.pieces:
            if CONTROL.fullmatch(piece.piece):
                piece.type = model.SentencePiece.CONTROL
        self.proto = proto
        own = {"bos_token": BOS, "eos_token": EOS}
        self.named = {**own, **(named or {})}
        renamed = any(self.named[name] != own[name] for name in own)
        self.control = pattern(
            piece.piece
            for piece in model.pieces
            if piece.type == model.SentencePiece.CONTROL
        )
        digest = hashlib.sha256(proto)
        # A template's text depends on them, and prepared rows on its text.
        if renamed:
            digest.update(repr(sorted(self.named.items())).encode())
        self.fingerprint = digest.hexdigest()
        # The copy: what llama.cpp must know, too.
        self.control_proto = model.SerializeToString()
        self._model = sentencepiece.SentencePieceProcessor(
            model_proto=self.control_proto
        )
        self.vocabulary_size = self._model.get_piece_size()
        # Other vocabularies call these <s> and </s>; the model knows which.
        self._named = {
            PAD: self._model.pad_id(),
            EOS: self._model.eos_id(),
            BOS: self._model.bos_id(),
        }
        ends = {self._named[EOS], self._model.piece_to_id(END)}
        ends -= {-1, self._model.unk_id()}
        self.stops = frozenset(ends | {*stops})
        self.foreign = renamed or self.stops != ends

    def encode(self, text):
        """str -> list of ids; no `<bos>`, no control token."""
        return self._model.encode(text)

    def encode_batch(self, texts):
        """List of str -> list of lists of ids, on all cores."""
        return self._model.encode(list(texts), num_threads=-1)

    def decode(self, ids, *, skip_control=True):
        """Ids -> str; control tokens are left out or written by name."""
        ids = [int(i) for i in ids]
        if skip_control:
            return self._model.decode(
                [i for i in ids if not self._model.is_control(i)]
            )
        parts, run = [], []
        for i in ids:
            if self._model.is_control(i):
                parts += [self._model.decode(run), self._model.id_to_piece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._model.decode(run)])

    def is_control(self, id):
        """Whether an id is a control token, which no text becomes."""
        return self._model.is_control(int(id))

    def id(self, piece):
        """The id of a piece by name, such as `<end_of_turn>`.

        Raises:
            UserError: the vocabulary has no such piece.
        """
        if self._named.get(piece, -1) >= 0:
            return self._named[piece]
        found = self._model.piece_to_id(piece)
        if self._model.id_to_piece(found) == piece:
            self._named[piece] = found
            return found
        raise UserError(
            f"The vocabulary ({self.vocabulary_size} pieces) has no "
            f"{piece!r}. Take a Gemma vocabulary, or a template without it: "
            "--data.template='Question: {prompt}\\nAnswer: {response}'"
        )

    def name(self, id):
        """The name of a control token, or a piece as it is written."""
        for known in (EOS, BOS, PAD):
            if self._named[known] == id:
                return known
        return self._model.id_to_piece(int(id))

    @property
    def pad(self):
        """The id that fills rows; 0 where the vocabulary has no `<pad>`."""
        return max(self._named[PAD], 0)

    @property
    def eos(self):
        """The id of `<eos>`."""
        return self.id(EOS)

    @property
    def bos(self):
        """The id of `<bos>`."""
        return self.id(BOS)

    @property
    def end_of_turn(self):
        """The id of `<end_of_turn>`."""
        return self.id(END)


class Example(NamedTuple):
    """One training example.

    Attributes:
        token_ids: int32 [n], `<bos>` first.
        learn: float32 [n], how much each id counts as a target; 0 is not at
            all, and the first never does.
        answer: index of the first token of the last learned run; 0 if none.
    """

    token_ids: np.ndarray
    learn: np.ndarray
    answer: int = 0


@dataclasses.dataclass
class Report:
    """What became of the records.

    `tokens` counts the places that examples fill in rows (n - 1 each),
    `learned_tokens` those with a target to learn, `typed` the records in which
    the name of a control token stands as text, `weighted` those of another
    weight than 1; `turns` says what became of turns that are not learned.
    """

    records: int = 0
    kept: int = 0
    examples: int = 0
    truncated: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    typed: int = 0
    weighted: int = 0
    turns: dict = dataclasses.field(default_factory=dict)
    dropped: dict = dataclasses.field(default_factory=dict)


def encode(rendered, tokenizer):
    """Segments of many records -> examples, uncut.

    Args:
        rendered: list of lists of `Segment`.
        tokenizer: `Tokenizer`.

    Returns:
        List of `Example`, one per record.

    Raises:
        UserError: the vocabulary lacks a control token.
    """
    texts = dict.fromkeys(
        segment.text
        for segments in rendered
        for segment in segments
        if not segment.control
    )
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    return [_join(segments, ids, tokenizer) for segments in rendered]


def _join(segments, ids, tokenizer):
    token_ids, learn, answer, before = [], [], 0, False
    for text, learned, control in segments:
        piece = [tokenizer.id(text)] if control else ids[text]
        if learned and not before:
            answer = len(token_ids)
        before = learned
        token_ids += piece
        learn += [learned] * len(piece)
    return Example(
        np.array(token_ids, "int32"), np.array(learn, "float32"), answer
    )


def cut(example, sequence_length, report, *, windows=False):
    """Makes one example fit into rows of T places, and counts.

    Args:
        example: `Example`.
        sequence_length: T.
        report: `Report`, which is updated.
        windows: split a long example into consecutive windows, each with its
            own `<bos>`, instead of cutting its end off.

    Returns:
        List of `Example` of at most T + 1 ids; empty if nothing is learned.
    """
    report.records += 1
    token_ids, learn, answer = example
    if not learn[1:].any():
        kept, reason = [], EMPTY
    elif windows:
        kept, reason = _windows(example, sequence_length), None
    else:
        size = sequence_length + 1
        kept = [Example(token_ids[:size], learn[:size], answer)]
        reason = None if learn[1:size].any() else TOO_LONG
        report.truncated += reason is None and len(token_ids) > size
    if reason:
        report.dropped[reason] = report.dropped.get(reason, 0) + 1
        return []
    report.kept += 1
    report.examples += len(kept)
    report.tokens += sum(len(e.token_ids) - 1 for e in kept)
    report.learned_tokens += sum(
        int(np.count_nonzero(e.learn[1:])) for e in kept
    )
    return kept


def _windows(example, size):
    """Every token but `<bos>` is the target of exactly one window."""
    first, body = example.token_ids[:1], example.token_ids[1:]
    learn, answer = example.learn, example.answer
    return [
        Example(
            np.concatenate([first, body[i : i + size]]),
            np.concatenate([learn[:1], learn[1:][i : i + size]]),
            answer,
        )
        for i in range(0, len(body), size)
    ]
