"""A vocabulary in Hugging Face's files: SentencePiece is the witness."""

import json
import pathlib

import pytest
import sentencepiece
from test_data_tokens import SHARED, train_vocabulary

import keras_gemma_ft
from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import tokenizer_files

transformers = pytest.importorskip("transformers")
EMBEDDED = (
    pathlib.Path(keras_gemma_ft.__file__).parent
    / "embedded/gemma2_tiny_en/assets/tokenizer/vocabulary.spm"
)
# Runs of spaces and newlines, tabs, scripts, literal block characters.
TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "a\tb\t\tc\r\nd\u00a0e\u2003f\u200bg",
    "감사합니다, 你好世界。 Привет мир! مرحبا नमस्ते 👩‍👩‍👧‍👦🏳️‍🌈",
    "don't  you   think    so?     1234567890 3.14159 <b>bold</b>",
    "\u2581x\u2581 y\x00\x7f\ufeff e\u0301 é",
    *(f"a{' ' * n}b{chr(10) * n}{chr(9) * n}c" for n in range(1, 41)),
]


def texts():
    """Ours, and those of the shared golden file where it is there."""
    path = SHARED / "gemma_tokenizer_golden" / "golden_all.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = {json.loads(line)["text"] for line in lines}
    # The only one that spells names of control tokens, which differ by design.
    return TEXTS + sorted(t for t in found if "<pad>" not in t)


@pytest.fixture(scope="module", params=["trained", "embedded"])
def proto(request):
    if request.param == "trained":
        return train_vocabulary()
    return EMBEDDED.read_bytes()


@pytest.fixture(scope="module")
def written(proto, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    tokenizer_files.write_tokenizer(
        folder, proto, chat_template="{{ bos_token }}hi"
    )
    return folder


def test_transformers_gives_the_ids_of_sentencepiece(proto, written):
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto)
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    assert type(theirs).__name__ == "GemmaTokenizer"
    for text in texts():
        want = ours.encode(text)
        found = theirs(text, add_special_tokens=False).input_ids
        assert found == want, repr(text)
        assert theirs(text).input_ids == [2, *want]
        assert theirs.decode(found) == ours.decode(want)
    assert theirs.chat_template == "{{ bos_token }}hi"
    named = theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id
    assert (*named, theirs.unk_token_id) == (0, 1, 2, 3)
    assert len(theirs) == ours.get_piece_size()
    # Ends of turns are left out of what is shown.
    ids = [2, *ours.encode("hi"), theirs.convert_tokens_to_ids("<end_of_turn>")]
    assert theirs.decode(ids, skip_special_tokens=True) == "hi"


def test_the_library_alone_reads_it(proto, written):
    tokenizers = pytest.importorskip("tokenizers")
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto)
    theirs = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    for text in texts():
        assert theirs.encode(text).ids == [2, *ours.encode(text)], repr(text)


def test_same_merges_as_transformers_own_conversion(proto, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    settings = {"tokenizer_class": "GemmaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = json.loads(theirs.backend_tokenizer.to_str())
    ours = tokenizer_files.tokenizer_json(tokenizer_files.parse(proto))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part]
    for name in ours["model"].keys() - {"vocab", "merges"}:
        assert ours["model"][name] == theirs["model"][name], name
    merges = [tuple(m.split(" ")) for m in ours["model"]["merges"]]
    assert sorted(merges) == sorted(map(tuple, theirs["model"]["merges"]))
    # In the order of the pieces that they make, runs of spaces aside, which
    # transformers 5 does not cut as SentencePiece does.

    def order(merges):
        made = dict.fromkeys("".join(pair) for pair in merges)
        return [text for text in made if text.strip("\n\u2581")]

    assert order(merges) == order(theirs["model"]["merges"])


@pytest.mark.parametrize("name", ["gemma_test_vocab", "gemma_export_vocab"])
def test_vocabularies_that_are_not_of_gemmas_kind(name, tmp_path):
    path = SHARED / "gemma_tiny_vocabs" / f"{name}.spm"
    if not path.exists():
        pytest.skip("shared data is absent")
    with pytest.raises(UserError, match="expected BPE.*nmt_nfkc"):
        tokenizer_files.write_tokenizer(
            tmp_path, path.read_bytes(), chat_template=""
        )
    assert not list(tmp_path.iterdir())


def test_what_is_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="no SentencePiece"):
        tokenizer_files.write_tokenizer(tmp_path, b"\xff", chat_template="")
