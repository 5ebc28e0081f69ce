"""A vocabulary in Hugging Face's files: SentencePiece is the witness."""

import importlib
import json
import pathlib

import pytest
import sentencepiece
from test_data_tokens import SHARED, train_vocabulary

import keras_gemma_ft
from keras_gemma_ft.config import UserError
from keras_gemma_ft.data.segments import Segment, split
from keras_gemma_ft.data.tokens import Tokenizer
from keras_gemma_ft.formats import tokenizer_files, tokenizer_folder

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


# --- tokenizer.json alone, read back ----------------------------------------

ROWS = 4160


def folder_of(told, folder, **settings):
    """A model folder whose tokenizer is tokenizer.json alone."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "gemma2", "vocab_size": ROWS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(told))
    if settings:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(settings))
    return folder


def of_transformers(proto, folder, **settings):
    """What transformers makes of a tokenizer.model, saved by it."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto)
    settings = {"tokenizer_class": "GemmaTokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder / "saved")
    return json.loads((folder / "saved" / "tokenizer.json").read_text())


def as_google(proto, told):
    """The same with merges in the order of the scores, as strings.

    That is how Google's own files were made, by transformers 4.
    """
    convert_slow_tokenizer = importlib.import_module(
        "transformers.convert_slow_tokenizer"
    )

    pieces = tokenizer_files.parse(proto).pieces
    found = convert_slow_tokenizer.generate_merges(
        {piece.piece: id for id, piece in enumerate(pieces)},
        [(piece.piece, piece.score) for piece in pieces],
    )
    merges = [" ".join(pair) for pair in found]
    return told | {"model": told["model"] | {"merges": merges}}


@pytest.mark.parametrize("form", ["ours", "transformers 5", "google"])
def test_tokenizer_json_alone(proto, written, tmp_path, form):
    told = json.loads((written / "tokenizer.json").read_text())
    if form != "ours":
        told = of_transformers(proto, tmp_path / "theirs")
    if form == "google":
        told = as_google(proto, told)
    folder = folder_of(told, tmp_path / "alone")
    found = tokenizer_folder.read(folder)
    assert found.said == ()
    ours = sentencepiece.SentencePieceProcessor(model_proto=found.proto)
    want = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts():
        ids = want.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == want.decode(ids)
        # transformers 5 itself cuts long runs of spaces in another way.
        if form != "transformers 5" or "    " not in text:
            found = theirs.encode(text, add_special_tokens=False).ids
            assert found == ids, repr(text)
    assert (ours.pad_id(), ours.eos_id(), ours.bos_id()) == (0, 1, 2)
    assert ours.unk_id() == 3
    # Every piece is at its id, and joined in the order of its score.
    left, right = map(
        tokenizer_files.parse, (ours.serialized_model_proto(), proto)
    )
    assert [p.piece for p in left.pieces] == [p.piece for p in right.pieces]
    plain = [p for p in right.pieces if p.type == 1 and len(p.piece) > 1]
    scores = {p.piece: p.score for p in left.pieces}
    assert [scores[p.piece] for p in plain] == [p.score for p in plain]


def test_a_real_vocabulary(tmp_path):
    path = SHARED / "spm_models" / "mistral-v1.model"
    if not path.exists():
        pytest.skip("shared data is absent")
    model = tokenizer_files.parse(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    proto = model.SerializeToString()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    told = as_google(proto, of_transformers(proto, tmp_path / "m", **names))
    folder = folder_of(told, tmp_path / "alone", **names)
    config = {"model_type": "gemma2", "vocab_size": 33000}
    (folder / "config.json").write_text(json.dumps(config))
    found = tokenizer_folder.read(folder)
    ours = sentencepiece.SentencePieceProcessor(model_proto=found.proto)
    want = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert [t for t in texts() if ours.encode(t) != want.encode(t)] == []
    # Ids that another program recorded, with the space that it put first.
    golden = SHARED / "gemma_tokenizer_golden"
    for name in ("small", "mixed"):
        lines = (golden / f"{name}_input.txt").read_bytes().splitlines()
        ids = (golden / f"{name}_tokens_mistral01.txt").read_text().splitlines()
        assert len(lines) == len(ids) > 10
        for line, numbers in zip(lines, ids):
            text = line.decode().replace("\\n", "\n").replace("\\s", " ")
            if "\\" in text or not numbers:
                continue
            want = [int(number) for number in numbers.split(",")]
            assert ours.encode(" " + text) == want, repr(text)


def test_the_tab_of_gemmas_first_files(proto, written, tmp_path):
    told = json.loads((written / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["\t"] = vocabulary.pop("<0x09>")
    folder = folder_of(told, tmp_path / "alone")
    ours = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer_folder.read(folder).proto
    )
    want = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert ours.encode("a\tb\t\tc") == want.encode("a\tb\t\tc")
    # Beside a tokenizer.model it is no contradiction either.
    (folder / "tokenizer.model").write_bytes(proto)
    assert tokenizer_folder.read(folder) == tokenizer_folder.Vocabulary(proto)


def test_ids_that_googles_tokenizer_gave(tmp_path):
    """Where the real vocabulary is at hand, as tokenizer.model or alone."""
    golden = SHARED / "gemma_tokenizer_golden" / "golden_all.jsonl"
    if not golden.exists():
        pytest.skip("shared data is absent")
    # Gemma's has 4 MB.
    real = [p for p in SHARED.rglob("*.model") if p.stat().st_size > 4_000_000]
    if not real:
        pytest.skip("the vocabulary of Gemma 2 is not at hand")
    proto = real[0].read_bytes()
    told = tokenizer_files.tokenizer_json(tokenizer_files.parse(proto))
    folder = folder_of(told, tmp_path / "alone")
    config = {"model_type": "gemma2", "vocab_size": 256_000}
    (folder / "config.json").write_text(json.dumps(config))
    ours = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer_folder.read(folder).proto
    )
    lines = map(json.loads, golden.read_bytes().splitlines())
    for line in (line for line in lines if line["tokenizer"] == "gemma1_2"):
        if "<pad>" not in line["text"]:
            assert ours.encode(line["text"]) == line["ids"], line["text"]


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("model.type", "WordPiece", "type='WordPiece', expected 'BPE'"),
        ("model.type", "Unigram", "type='Unigram'"),
        ("model.byte_fallback", False, "byte_fallback=False"),
        ("model.ignore_merges", True, "ignore_merges=True"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix='</w>'"),
        ("model.dropout", 0.1, "dropout=0.1"),
        ("model.vocab", {"a": 0, "b": 7}, "are not 0, 1, 2"),
        ("model.vocab", {"a": "0"}, "'a': '0'"),
        ("model.vocab", [["a", -1.0]], "no vocabulary of pieces and ids"),
        ("model.merges", ["a b c"], "no list of pairs"),
        ("model.merges", [["e", "\u4e2d"]], "make no piece: 'e\u4e2d'"),
        ("normalizer", {"type": "NFKC"}, "normalizer: {'type': 'NFKC'}"),
        ("normalizer", None, "normalizer: None"),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": False},
            "pre_tokenizer: {'type': 'ByteLevel'",
        ),
        ("model", None, "no vocabulary"),
    ],
)
def test_tokenizers_of_another_kind(written, tmp_path, part, value, words):
    told = json.loads((written / "tokenizer.json").read_text())
    place, *names = part.split(".")
    if names:
        told[place][names[0]] = value
    else:
        told[place] = value
    with pytest.raises(UserError, match="Copy tokenizer.model") as caught:
        tokenizer_folder.read(folder_of(told, tmp_path / "alone"))
    assert words in str(caught.value)


def test_merges_that_are_no_scores(tmp_path):
    model = tokenizer_files.parse(EMBEDDED.read_bytes())
    told = tokenizer_files.tokenizer_json(model)
    merges = told["model"]["merges"]
    made = [m.replace(" ", "") for m in merges]
    # Of the last piece that two merges make.
    last = max(i for i, text in enumerate(made) if text in made[:i])
    split = merges[last]
    told["model"]["merges"] = [m for m in merges if m != split]
    with pytest.raises(UserError, match="merges that are missing") as caught:
        tokenizer_folder.read(folder_of(told, tmp_path / "alone"))
    assert "{!r} {!r}".format(*split.split(" ")) in str(caught.value)
    # A piece that is made both before and after another one.
    rest = [m for m in merges if m != split]
    told["model"]["merges"] = [split, *rest]
    with pytest.raises(UserError, match="merges that are not in order"):
        tokenizer_folder.read(folder_of(told, tmp_path / "alone"))


# --- tokens that other tools have added --------------------------------------


def added(proto, folder, *, alone=False, **tokens):
    """A folder that transformers saved with further tokens."""
    tokenizer_files.write_tokenizer(folder, proto, chat_template="")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if tokens.get("special"):
        named = {"additional_special_tokens": tokens["special"]}
        theirs.add_special_tokens(named)
    theirs.add_tokens(tokens.get("plain", []))
    if "eos" in tokens:
        theirs.eos_token = tokens["eos"]
    for path in folder.iterdir():
        if path.name != "tokenizer.model" or alone:
            path.unlink()
    theirs.save_pretrained(folder)
    config = {"model_type": "gemma2", "vocab_size": ROWS, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("alone", [True, False])
def test_added_tokens_are_pieces(proto, tmp_path, alone):
    theirs = added(
        proto,
        tmp_path,
        alone=alone,
        special=["<|im_start|>", "<|im_end|>"],
        plain=["w\u00f6rd", "two words", "<tool>"],
        eos="<|im_end|>",
    )
    found = tokenizer_folder.read(tmp_path)
    ours = Tokenizer(found.proto, stops=found.stops, named=found.named)
    assert found.said == ()
    assert ours.vocabulary_size == len(theirs)
    for text in (
        "a w\u00f6rd b",
        "aw\u00f6rdtwo words",
        "x<tool>y",
        "two  words",
    ):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    assert theirs.convert_tokens_to_ids("<tool>") in ours.encode("<tool>")
    for name in ("<|im_start|>", "<|im_end|>", "<end_of_turn>"):
        id = theirs.convert_tokens_to_ids(name)
        assert ours.id(name) == id and ours.is_control(id)
        # Text never becomes one, and none is shown.
        assert id not in ours.encode(f"a{name}b")
        assert ours.decode(ours.encode(f"a{name}b")) == f"a{name}b"
        assert ours.decode([id]) == ""
        assert split(f"a{name}b", control=ours.control)[1] == Segment(
            name, 0.0, True
        )
    end = ours.id("<|im_end|>")
    assert ours.stops == {1, end, ours.end_of_turn}
    assert ours.named["eos_token"] == "<|im_end|>"


def test_added_tokens_are_written_again(proto, tmp_path):
    """As of a model that was tuned here and is exported."""
    theirs = added(
        proto,
        tmp_path,
        alone=True,
        special=["<|im_start|>", "<|im_end|>"],
        plain=["w\u00f6rd", "two words", "<tool>"],
    )
    read = tokenizer_folder.read(tmp_path)
    model = tokenizer_files.parse(read.proto)
    model.pieces.add(piece="[PAD]", score=0.0, type=5)
    model.pieces.add(piece="<last>", score=0.0, type=4)
    proto = model.SerializeToString()
    again = tmp_path / "again"
    again.mkdir()
    named = {"eos_token": "<|im_end|>"}
    tokenizer_files.write_tokenizer(again, proto, chat_template="", named=named)
    config = {"model_type": "gemma2", "vocab_size": ROWS}
    (again / "config.json").write_text(json.dumps(config))
    written = transformers.AutoTokenizer.from_pretrained(again)
    assert len(written) == len(theirs) + 2
    assert written.eos_token == "<|im_end|>"
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto)
    marks = "<|im_start|>w\u00f6rd<|im_end|>\n", "x <last> y"
    for text in (*texts(), "a two words b<tool>", *marks):
        ids = written(text, add_special_tokens=False).input_ids
        if "<|" not in text:
            assert ids == ours.encode(text), repr(text)
        if "<last>" not in text:
            assert ids == theirs(text, add_special_tokens=False).input_ids
    # Both files are of one vocabulary, which is what was written.
    assert tokenizer_folder.read(again).proto == proto
    (again / "tokenizer.model").unlink()
    found = tokenizer_files.parse(tokenizer_folder.read(again).proto).pieces
    assert [p.piece for p in found] == [p.piece for p in model.pieces]


FILES = {
    "added_tokens.json": lambda id: {"<x>": id},
    "tokenizer_config.json": lambda id: {
        "added_tokens_decoder": {str(id): {"content": "<x>", "special": True}}
    },
}


@pytest.mark.parametrize("file", FILES)
def test_each_file_that_may_add(proto, tmp_path, file):
    size = len(tokenizer_files.parse(proto).pieces)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    config = {"model_type": "gemma2", "vocab_size": ROWS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / file
    path.write_text(json.dumps(FILES[file](size + 3)))
    found = tokenizer_folder.read(tmp_path)
    pieces = tokenizer_files.parse(found.proto).pieces
    # The rows between are nobody's.
    gap = [(p.piece, p.type) for p in pieces[size:]]
    assert gap[:3] == [(f"[PAD{size + i}]", 5) for i in range(3)]
    special = file == "tokenizer_config.json"
    assert gap[3:] == [("<x>", 3 if special else 4)]
    ours = Tokenizer(found.proto)
    assert (size + 3 in ours.encode("a<x>b")) != special
    assert not set(ours.encode(f"[PAD{size}]")) & {size, size + 1, size + 2}
    # A template that writes it makes it a control token.
    found = tokenizer_folder.read(tmp_path, template="<x>{{ messages }}")
    assert Tokenizer(found.proto).is_control(size + 3)
    path.write_text(json.dumps(FILES[file](ROWS)))
    with pytest.raises(UserError, match=f"id {ROWS}, and the model {ROWS} row"):
        tokenizer_folder.read(tmp_path)


@pytest.mark.parametrize(
    "file, told, words",
    [
        ("added_tokens.json", {"<x>": 350, "<y>": 350}, "350 is '<y>', in"),
        ("added_tokens.json", {"<mask>": 350}, "350 is '<mask>', which is 4"),
        ("added_tokens.json", {"<x>": -1}, "is no token"),
        ("added_tokens.json", {"<x>": "350"}, "is no token"),
        ("added_tokens.json", {"": 350}, "is no token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"350": {"content": "x", "rstrip": True}}},
            "'x' has rstrip",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3.5": {"content": "x"}}},
            "is no token",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "no token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"330": {"content": "<x>"}}},
            "330: '",
        ),
    ],
)
def test_added_tokens_that_cannot_be(tmp_path, file, told, words):
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    config = {"model_type": "gemma2", "vocab_size": ROWS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(told))
    with pytest.raises(UserError, match="Save the tokenizer again") as caught:
        tokenizer_folder.read(tmp_path)
    assert words in str(caught.value)


def test_files_of_two_vocabularies(written, tmp_path):
    told = json.loads((written / "tokenizer.json").read_text())
    folder = folder_of(told, tmp_path / "both")
    other = train_vocabulary()
    if (written / "tokenizer.model").read_bytes() == other:
        other = EMBEDDED.read_bytes()
    (folder / "tokenizer.model").write_bytes(other)
    with pytest.raises(UserError, match="are of two vocabularies"):
        tokenizer_folder.read(folder)
    # A piece that only one of them has.
    (folder / "tokenizer.model").write_bytes(
        (written / "tokenizer.model").read_bytes()
    )
    size = len(told["model"]["vocab"])
    told["model"]["vocab"]["abcabc"] = size
    folder_of(told, folder)
    with pytest.raises(UserError, match=f"{size}: only here, 'abcabc'"):
        tokenizer_folder.read(folder)


def test_a_piece_under_another_name(proto, written, tmp_path):
    text = (written / "tokenizer.json").read_text()
    text = text.replace("<start_of_turn>", "<|im_start|>")
    folder = folder_of(json.loads(text), tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(proto)
    found = tokenizer_folder.read(folder)
    ours, plain = Tokenizer(found.proto), Tokenizer(proto)
    id = plain.id("<start_of_turn>")
    assert ours.id("<|im_start|>") == id and ours.is_control(id)
    [said] = found.said
    assert f"{id} is '<|im_start|>', not '<start_of_turn>'" in said


def test_ends_that_a_folder_names(proto, tmp_path):
    size = len(tokenizer_files.parse(proto).pieces)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    config = {"model_type": "gemma2", "vocab_size": ROWS, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = {"eos_token_id": [1, 6, size, "7"], "stop_strings": ["\n", "no way"]}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    settings = {"eos_token": {"content": "<mask>"}, "pad_token": "<none>"}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    found = tokenizer_folder.read(tmp_path)
    ours = Tokenizer(found.proto, stops=found.stops)
    assert found.stops == {1, 4, 5, 6, ours.id("\n")}
    # What ends an answer may be text all the same.
    assert ours.encode("\n") == [ours.id("\n")]
    said = "\n".join(found.said)
    for word in (f"{size} is no", "'7' is no", "'no way' is", "'<none>'"):
        assert word in said
    assert found.proto == proto


def test_folders_without_a_tokenizer(tmp_path):
    for config in ('{"model_type": "gemma2"}', "{}"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match="has no tokenizer: expected"):
            tokenizer_folder.read(tmp_path)
    # Keras's own tokenizer.json is another thing.
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert tokenizer_folder.read(tmp_path).proto == b"x"
