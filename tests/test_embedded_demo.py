"""The embedded task and tokenizer: made as written, apart, and learnable."""

import collections
import itertools
import json
import re
import string

import pytest
import sentencepiece

from keras_gemma_ft import embedded
from keras_gemma_ft.embedded import demo, sentences, tokenizer

VOCABULARY = (
    embedded.preset_folder() / "assets" / "tokenizer" / "vocabulary.spm"
)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))


def read(split):
    text = embedded.demo_file(split).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_files_are_what_the_generator_writes():
    for split, rows in demo.records().items():
        written = embedded.demo_file(split).read_bytes()
        assert demo.to_jsonl(rows) == written


def test_another_seed_makes_another_task():
    assert demo.records(seed=1)["eval"] != demo.records(seed=2)["eval"]


def test_demo_file_names_the_splits_there_are():
    with pytest.raises(ValueError, match="'test'.*'train' or 'eval'"):
        embedded.demo_file("test")


def bag(prompt):
    """The words that matter: our own reading of "the same request"."""
    polite = (
        "please thanks thank cheers hey hi there ok could can would you now "
        "my hands are full"
    ).split()
    words = re.findall(r"\w+|%", prompt.lower())
    return tuple(word for word in words if word not in polite)


def test_no_request_is_in_both_splits():
    train, held_out = read("train"), read("eval")
    assert (len(train), len(held_out)) == (2940, 150)
    shown = {bag(row["prompt"]) for row in train}
    assert not [r for r in held_out if bag(r["prompt"]) in shown]


def test_no_combination_of_slots_is_in_both_splits():
    shown = {row["response"] for row in read("train")}
    held_out = [row["response"] for row in read("eval")]
    assert len(set(held_out)) == len(held_out)
    assert not shown.intersection(held_out)


def test_every_value_is_shown_often_enough():
    seen = collections.Counter(
        (answer["intent"], *pair)
        for answer in (json.loads(row["response"]) for row in read("train"))
        for pair in answer.items()
    )
    possible = {
        (name, *pair)
        for name, intent in sentences.INTENTS.items()
        for slots in intent.combinations()
        for pair in {"intent": name, **slots}.items()
    }
    assert possible == set(seen)
    assert min(seen.values()) >= demo.LEAST_SEEN


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_strict_json_in_one_form(split):
    for row in read(split):
        assert list(row) == ["prompt", "response"]
        answer = json.loads(row["response"])
        assert json.dumps(answer, separators=(",", ":")) == row["response"]
        name = answer.pop("intent")
        assert answer in sentences.INTENTS[name].combinations()
        # Keys keep the order of the slots; an absent one leaves no gap.
        names = []
        for slot in sentences.INTENTS[name].slots:
            names += slot if isinstance(slot, tuple) else [slot]
        assert list(answer) == [n for n in names if n in answer]


def test_digits_of_a_request_are_those_of_its_answer():
    with_digits = 0
    for row in itertools.chain(read("train"), read("eval")):
        said = re.findall(r"\d+", row["prompt"])
        with_digits += bool(said)
        assert len(said) <= 1
        assert said == [] or said == re.findall(r"\d+", row["response"])
    assert with_digits > 900


class First:
    """Stands for `random.Random`: always the first choice."""

    @staticmethod
    def choice(values):
        return values[0]


@pytest.mark.parametrize(
    "value, words",
    [
        (0, "zero"),
        (19, "nineteen"),
        (20, "twenty"),
        (21, "twenty one"),
        (100, "one hundred"),
        (105, "one hundred and five"),
        (180, "one hundred and eighty"),
        (299, "two hundred and ninety nine"),
    ],
)
def test_number_words(value, words):
    assert sentences.number_words(value, First) == words


def test_normalize_takes_politeness_off():
    assert (
        demo.normalize("Hey, could you set a timer for 5 minutes, thank you?")
        == demo.normalize("set a timer for 5 minutes")
        == "set a timer for 5 minutes"
    )


def test_rows_are_short(pieces):
    for row in itertools.chain(read("train"), read("eval")):
        assert len(pieces.encode(row["prompt"])) <= 45
        assert len(pieces.encode(row["response"])) <= 25


def test_reserved_ids_are_gemmas(pieces):
    expected = {
        0: "<pad>",
        1: "<eos>",
        2: "<bos>",
        3: "<unk>",
        4: "<mask>",
        5: "<2mass>",
        6: "[@BOS@]",
        7: "<unused0>",
        105: "<unused98>",
        106: "<start_of_turn>",
        107: "<end_of_turn>",
        108: "\n",
        109: "\n\n",
        115: "<0x00>",
        370: "<0xFF>",
    }
    assert {i: pieces.id_to_piece(i) for i in expected} == expected
    assert pieces.get_piece_size() == 4096
    assert pieces.encode("<start_of_turn>user\n")[0] == 106


def test_each_printable_ascii_character_is_a_piece(pieces):
    for character in string.printable:
        if character.isprintable() and character != " ":
            assert pieces.piece_to_id(character) > 370, character
    assert pieces.piece_to_id("\u2581") > 370


@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces  ",
        "    four\n\ttab\r\n",
        "a\n\n\nb\n\n\n\n\n\nc\n",
        "emoji \U0001f642, caf\u00e9, \u2014",
        "\ud55c\uad6d\uc5b4 \uc548\ub155",
        '{"intent":"timer","minutes":25}',
    ],
)
def test_any_text_comes_back(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


def test_digits_are_split(pieces):
    assert pieces.encode("12345", out_type=str) == list("12345")


@pytest.mark.parametrize("value", [*range(20), *range(20, 100, 10)])
def test_number_words_are_pieces(pieces, value):
    assert len(pieces.encode(" " + sentences.number_words(value, First))) == 1


def test_train_tokenizer_again_gives_the_same_bytes(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time in the kitchen.\n\nThe end.\n" * 50)
    extra = tokenizer.demo_texts(embedded.demo_file("eval"))
    first, second = (
        tokenizer.train_tokenizer([book], extra, vocabulary_size=700)
        for _ in range(2)
    )
    assert first == second
    small = sentencepiece.SentencePieceProcessor(model_proto=first)
    assert small.get_piece_size() == 700
    assert small.piece_to_id("<end_of_turn>") == 107


def test_train_tokenizer_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="vocabulary_size=300 leaves"):
        tokenizer.train_tokenizer([], [], vocabulary_size=300)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="no text in the 1 files"):
        tokenizer.train_tokenizer([empty], [])
