"""Tokenizer, segments -> ids, cutting: against ids written by hand."""

import hashlib
import io
import pathlib

import numpy as np
import pytest
import sentencepiece

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import templates, tokens
from keras_gemma_ft.data.segments import Segment

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
CONTROLS = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"]


def train_vocabulary():
    """A small model laid out like Gemma's: control tokens are found in text."""
    sentences = [
        "the quick brown fox jumps over the lazy dog",
        "user asks and model answers: question, answer, prompt, response",
        "what is two plus two? two plus two is four.",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*CONTROLS, "\n"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def vocabulary():
    return train_vocabulary()


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return tokens.Tokenizer(vocabulary)


def test_ids_of_control_tokens(tokenizer):
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    ids = [tokenizer.id(piece) for piece in CONTROLS]
    assert ids == [4, 5, 6, 7]
    assert tokenizer.end_of_turn == 7
    assert tokenizer.vocabulary_size == 340


@pytest.mark.parametrize("piece", [*CONTROLS, "<bos>", "<eos>", "<pad>"])
def test_control_token_in_text_is_text(tokenizer, vocabulary, piece):
    raw = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    if piece in CONTROLS:  # What the demotion is for.
        assert raw.piece_to_id(piece) in raw.encode(f"hi {piece} there")
    ids = tokenizer.encode(f"hi {piece} there")
    assert not set(ids) & set(range(8))
    assert tokenizer.decode(ids) == f"hi {piece} there"


def test_newline_stays_one_piece(tokenizer):
    newline = tokenizer.id("\n")
    assert tokenizer.encode("\n") == [newline]
    assert tokenizer.encode("two\n\n").count(newline) == 2


def test_batch_equals_single(tokenizer):
    texts = ["the fox", "", "감사 😀", " two  spaces ", "a\u0085b\u2028c"]
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_decode_control(tokenizer):
    ids = [2, 6, *tokenizer.encode("user\nhi"), 7, np.int32(1)]
    assert tokenizer.decode(ids) == "user\nhi"
    assert (
        tokenizer.decode(ids, skip_control=False)
        == "<bos><start_of_turn>user\nhi<end_of_turn><eos>"
    )


def test_fingerprint_is_of_the_original(tokenizer, vocabulary):
    assert tokenizer.fingerprint == hashlib.sha256(vocabulary).hexdigest()


def test_broken_vocabulary():
    with pytest.raises(UserError, match="no SentencePiece"):
        tokens.Tokenizer(b"\xff\xff not a model")


def test_vocabulary_without_turns(tokenizer):
    with pytest.raises(UserError, match="--data.template"):
        tokenizer.id("<start_of_image>")


def test_turn_tokens_of_a_shared_vocabulary():
    path = SHARED / "gemma_tiny_vocabs" / "gemma_export_vocab.spm"
    if not path.exists():
        pytest.skip("shared data is absent")
    tokenizer = tokens.Tokenizer(path.read_bytes())
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    assert tokenizer.id("<start_of_turn>") == 4
    assert tokenizer.end_of_turn == 5
    assert not {4, 5} & set(tokenizer.encode("<start_of_turn><end_of_turn>"))


def test_other_names_of_bos_and_eos():
    path = SHARED / "spm_models" / "mistral-v1.model"
    if not path.exists():
        pytest.skip("shared data is absent")
    tokenizer = tokens.Tokenizer(path.read_bytes())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 0)
    with pytest.raises(UserError, match="<end_of_turn>"):
        tokenizer.end_of_turn  # noqa: B018


def test_encode_by_hand(tokenizer):
    segments = [
        Segment("<bos>", control=True),
        Segment("<start_of_turn>", control=True),
        Segment("user\n<bos>"),
        Segment("<end_of_turn>", True, True),
    ]
    [example] = tokens.encode([segments], tokenizer)
    text = tokenizer.encode("user\n<bos>")
    np.testing.assert_array_equal(example.token_ids, [2, 6, *text, 7])
    np.testing.assert_array_equal(
        example.learn, [False] * (2 + len(text)) + [True]
    )
    assert example.token_ids.dtype == np.int32
    assert example.answer == 2 + len(text)
    assert example.token_ids.tolist().count(tokenizer.bos) == 1


def test_answer_is_the_last_learned_run(tokenizer):
    segments = templates.prompt("two?")
    segments += [Segment("four", True), Segment("<end_of_turn>", True, True)]
    segments += templates.prompt("and?")[1:]
    asked = tokens.encode([segments], tokenizer)[0].token_ids
    segments += [Segment("four.", True), Segment("<end_of_turn>", True, True)]
    [example] = tokens.encode([segments], tokenizer)
    np.testing.assert_array_equal(example.token_ids[: example.answer], asked)


def example_of(learn):
    learn = np.array(learn, bool)
    return tokens.Example(np.arange(2, 2 + len(learn), dtype="int32"), learn)


def test_cut_keeps_what_fits():
    report = tokens.Report()
    [kept] = tokens.cut(example_of([0, 0, 1, 1, 1]), 4, report)
    assert len(kept.token_ids) == 5 and report.truncated == 0
    [kept] = tokens.cut(example_of([0, 0, 1, 1, 1]), 3, report)
    np.testing.assert_array_equal(kept.token_ids, [2, 3, 4, 5])
    assert report.truncated == 1
    assert (report.tokens, report.learned_tokens) == (4 + 3, 3 + 2)


def test_cut_drops_what_teaches_nothing():
    report = tokens.Report()
    assert tokens.cut(example_of([0, 0, 0]), 8, report) == []
    assert tokens.cut(example_of([0, 0, 0, 0, 1]), 3, report) == []
    assert tokens.cut(example_of([1]), 3, report) == []
    assert report.dropped == {tokens.EMPTY: 2, tokens.TOO_LONG: 1}
    assert (report.records, report.kept, report.truncated) == (3, 0, 0)


@pytest.mark.parametrize("n", [2, 4, 5, 6, 9, 10, 11])
def test_windows_teach_every_token_once(n):
    report = tokens.Report()
    example = example_of([False] + [True] * (n - 1))
    kept = tokens.cut(example, 4, report, windows=True)
    assert all(window.token_ids[0] == 2 for window in kept)
    assert all(len(window.token_ids) <= 5 for window in kept)
    taught = np.concatenate([w.token_ids[1:][w.learn[1:]] for w in kept])
    np.testing.assert_array_equal(taught, example.token_ids[1:])
    assert report.learned_tokens == n - 1 and report.truncated == 0
