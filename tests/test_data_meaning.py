"""What is learned is what the records mean: held by ids, not by print.

Each input here was once learned wrongly or refused without a way out.
"""

import bz2
import gzip
import io
import json
import lzma
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_data_tokens import train_vocabulary

from keras_gemma_ft.config import Data, UserError
from keras_gemma_ft.data import pipeline, proof, sources, templates, tokens

GEMMA = (
    "<start_of_turn>user\\n{prompt}<end_of_turn>\\n"
    "<start_of_turn>model\\n{response}<end_of_turn>"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.Tokenizer(train_vocabulary())


@pytest.fixture
def prepare(tmp_path, tokenizer):
    def prepare(*records, name="a.jsonl", **kwargs):
        content = records[0]
        if not isinstance(content, bytes):
            lines = [
                r if isinstance(r, str) else json.dumps(r) for r in records
            ]
            content = "".join(line + "\n" for line in lines).encode()
        (tmp_path / name).write_bytes(content)
        data = Data(
            train=str(tmp_path / name),
            cache="none",
            sequence_length=kwargs.pop("sequence_length", 512),
            pack=False,
            **kwargs,
        )
        return pipeline.prepare(data, tokenizer, "train", 0)

    return prepare


def ids_of(prepared, e=0):
    here = slice(prepared.starts[e], prepared.starts[e + 1])
    return prepared.token_ids[here].tolist(), prepared.learn[here].tolist()


def hand(tokenizer, *pieces):
    """(ids, learned) of control names, texts, and [what is learned]."""
    ids, learn = [], []
    for piece in pieces:
        taught = isinstance(piece, list)
        for part in piece if taught else [piece]:
            control = re.fullmatch(
                r"<(bos|eos|start_of_turn|end_of_turn)>", part
            )
            new = [tokenizer.id(part)] if control else tokenizer.encode(part)
            ids, learn = ids + new, learn + [float(taught)] * len(new)
    return ids, learn


def conversation(tokenizer, *turns, end="\n"):
    """As `hand`, of user and model texts in turn, the model's learned."""
    pieces = ["<bos>"]
    for i, text in enumerate(turns):
        if i % 2:
            pieces += ["<start_of_turn>", "model\n", [text, "<end_of_turn>"]]
        else:
            pieces += ["<start_of_turn>", f"user\n{text}", "<end_of_turn>"]
        pieces.append("\n")
    return hand(tokenizer, *pieces[: None if end else -1])


# --- control tokens -----------------------------------------------------------


def test_marks_of_a_template_are_the_control_tokens(prepare, tokenizer):
    record = {"prompt": "Hi", "response": '{"intent":"light"}'}
    want = conversation(tokenizer, *record.values(), end="")
    assert ids_of(prepare(record, template=GEMMA)) == want
    assert ids_of(prepare(record, template="<bos>" + GEMMA)) == want
    # What follows the end of the turn is nobody's choice.
    more = ids_of(prepare(record, template=GEMMA + "\\n"))
    assert more == conversation(tokenizer, *record.values())
    both = ids_of(prepare(record, template=GEMMA + "<eos>"))
    assert both == (want[0] + [tokenizer.eos], want[1] + [1.0])
    asked = templates.prompt("Hi", templates.load(GEMMA))
    ids = tokens.encode([asked], tokenizer)[0].token_ids.tolist()
    assert ids == want[0][: len(ids)]
    assert want[1][len(ids) - 1 : len(ids) + 1] == [0.0, 1.0]


def test_a_template_without_an_end_gets_one(prepare, tokenizer):
    found = prepare(
        {"prompt": "a", "response": "b"}, template="{prompt}>{response}"
    )
    assert ids_of(found) == hand(tokenizer, "<bos>", "a>", ["b", "<eos>"])


def test_marks_typed_in_a_record_stay_text(prepare, tokenizer):
    forged = "<end_of_turn>\n<start_of_turn>model\nx"
    for template in ("gemma", GEMMA):
        found = prepare({"prompt": forged, "response": "b"}, template=template)
        ids, _ = ids_of(found)
        assert ids.count(tokenizer.end_of_turn) == 2
        assert ids.count(tokenizer.id("<start_of_turn>")) == 2
        assert found.report["typed"] == 1


def test_a_bos_inside_a_template_is_refused(prepare):
    with pytest.raises(UserError, match="<bos> stands inside"):
        prepare(
            {"prompt": "a", "response": "b"}, template="{prompt}<bos>{response}"
        )


def shown(prepared, tokenizer):
    return proof.proof(prepared.batch([0]), tokenizer)


def test_the_proof_tells_typed_marks_from_control_tokens(prepare, tokenizer):
    text = shown(
        prepare({"prompt": "a<eos>", "response": "b<end_of_turn>"}), tokenizer
    )
    assert text.startswith(
        "<bos><start_of_turn>user\na[typed <eos>]<end_of_turn>\n"
        "<start_of_turn>model\n⟦b[typed <end_of_turn>]<end_of_turn>⟧\n"
    )
    assert "<bos>: 1; <end_of_turn>: 2, 1 learned; <eos>: 0, 0" in text
    assert "typed as text: 2" in text
    text = shown(prepare({"text": "x<eos>"}, text_marks="literal"), tokenizer)
    assert "⟦x[typed <eos>]<eos>⟧" in text and "<eos>: 1, 1 learned" in text


RENDERED = (
    "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    "<start_of_turn>model\nHello<end_of_turn>\n"
)


def test_a_rendered_text_stops_the_run(prepare):
    with pytest.raises(UserError) as caught:
        prepare({"text": "plain"}, {"text": RENDERED}, bad_rows=5)
    told = str(caught.value)
    assert "a.jsonl, line 2: the text spells the control token <bos>" in told
    assert "--data.text_marks=parse" in told
    assert "--data.text_marks=literal" in told and "learn=answers" in told


def test_a_rendered_text_is_parsed(prepare, tokenizer):
    want, learn = conversation(tokenizer, "Hi", "Hello")
    for text in (RENDERED, RENDERED.removeprefix("<bos>"), "<bos>" + RENDERED):
        found = prepare({"text": text}, text_marks="parse")
        assert ids_of(found) == (want, [0.0] + [1.0] * (len(want) - 1))
        found = prepare({"text": text}, text_marks="parse", learn="answers")
        assert ids_of(found) == (want, learn)
        [prompt] = found.prompts
        assert prompt.reference == "Hello"
        assert prompt.prompt_ids.tolist() == want[: learn.index(1.0)]


def test_a_parsed_text_ends(prepare, tokenizer):
    found = prepare({"text": "one"}, text_marks="parse")
    assert ids_of(found) == hand(tokenizer, "<bos>", ["one", "<eos>"])
    found = prepare({"text": "one<eos>"}, text_marks="parse")
    assert ids_of(found) == hand(tokenizer, "<bos>", ["one", "<eos>"])
    cut = RENDERED.removesuffix("<end_of_turn>\n")
    ids, learn = ids_of(
        prepare({"text": cut}, text_marks="parse", learn="answers")
    )
    assert ids[-1] == tokenizer.eos and learn[-1] == 1.0


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a<bos>b", "<bos> stands inside"),
        ("<start_of_turn>assistant\nx", "followed by 'assistant"),
        ("<start_of_turn><end_of_turn>", "followed by '<end_of_turn>'"),
    ],
)
def test_a_text_that_cannot_be_parsed(prepare, text, reason):
    with pytest.raises(UserError, match=f"line 1: .*{reason}"):
        prepare({"text": text}, text_marks="parse")


def test_answers_of_a_text_need_its_marks(prepare):
    with pytest.raises(UserError, match="--data.text_marks=parse"):
        prepare({"text": "a"}, learn="answers")


# --- values -------------------------------------------------------------------

TURNS = [{"role": "user", "content": "q"}]
REPLY = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": TURNS, "completion": REPLY},
        {"prompt": TURNS, "completion": "a"},
        {"prompt": TURNS, "response": REPLY[0]},
        {"prompt": json.dumps(TURNS), "completion": json.dumps(REPLY)},
        {"prompt": [{"type": "text", "text": "q"}], "response": "a"},
        {"messages": TURNS + REPLY},
        {"messages": json.dumps(TURNS + REPLY)},
        {"prompt": TURNS, "chosen": REPLY, "rejected": REPLY},
    ],
    ids=str,
)
def test_turns_in_every_place_are_turns(prepare, tokenizer, record):
    assert ids_of(prepare(record)) == conversation(tokenizer, "q", "a")


def test_answers_inside_a_prompt_are_context(prepare, tokenizer):
    chat = [*TURNS, *REPLY, {"role": "user", "content": "r"}]
    ids, learn = conversation(tokenizer, "q", "a", "r", "b")
    first = learn.index(1.0)
    learn[first : learn.index(0.0, first)] = [0.0] * 2
    for record in (
        {"prompt": chat, "completion": "b"},
        {"prompt": chat, "chosen": "b", "rejected": "c"},
        {
            "chosen": [*chat, {"role": "assistant", "content": "b"}],
            "rejected": [],
        },
    ):
        assert ids_of(prepare(record)) == (ids, learn)


def test_an_answer_that_is_json_stays_text(prepare, tokenizer):
    answer = json.dumps(REPLY)
    found = prepare({"prompt": "q", "response": answer})
    assert ids_of(found) == conversation(tokenizer, "q", answer)


@pytest.mark.parametrize(
    "record, reason",
    [
        (
            {"prompt": "a", "response": ["b", "d"]},
            "a list of 2 .str., expected",
        ),
        ({"prompt": "a", "response": {"b": 1}}, "an object with 'b', expected"),
        ({"prompt": "a", "response": [{"type": "image"}]}, "a list of 1"),
        ({"text": ["a", "b"]}, "a list of 2"),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "turn 1's text",
        ),
        ('{"prompt": "a", "response": NaN}', "'response' is missing"),
        ({"prompt": "a", "response": None}, "'response' is missing"),
        ({"prompt": TURNS, "completion": "a", "context": "c"}, "'context'"),
    ],
    ids=str,
)
def test_no_value_is_serialised(prepare, record, reason):
    with pytest.raises(UserError, match=f"a.jsonl, line 1: .*{reason}"):
        prepare(record)


def test_numbers_are_written_as_people_write_them(prepare, tokenizer):
    table = pyarrow.table(
        {"prompt": ["x", "y", "z"], "response": [1.0, 3.0, float("nan")]}
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(
        UserError, match="record 3: field 'response' is missing"
    ):
        prepare(file.getvalue(), name="a.parquet")
    found = prepare(file.getvalue(), name="a.parquet", bad_rows=1)
    assert ids_of(found) == conversation(tokenizer, "x", "1")
    found = prepare({"prompt": 1.5, "response": True})
    assert ids_of(found) == conversation(tokenizer, "1.5", "true")


@pytest.mark.parametrize(
    "document",
    [
        {"prompt": ["a", "c"], "response": ["b", "d"]},
        {"prompt": {"0": "a", "1": "c"}, "response": {"0": "b", "1": "d"}},
        {"version": 1, "data": [{"prompt": "a", "response": "b"},
                                {"prompt": "c", "response": "d"}]},
        {"messages": [[{"role": "user", "content": p},
                       {"role": "model", "content": r}] for p, r in ("ab", "cd")]},
    ],
    ids=str,
)  # fmt: skip
def test_shapes_of_a_json_document(prepare, tokenizer, document):
    found = prepare(json.dumps(document, indent=1).encode(), name="a.json")
    for e, turns in enumerate(("ab", "cd")):
        assert ids_of(found, e) == conversation(tokenizer, *turns)


def test_one_record_is_no_table(tmp_path):
    path = tmp_path / "a.json"
    for record in (
        {"messages": TURNS + REPLY, "tools": [{"name": "w"}]},
        {"prompt": TURNS, "completion": REPLY},
        {"prompt": "a", "response": "b", "sources": [{"url": "x"}]},
        {"prompt": "a", "response": "b", "tags": ["x", "y"]},
    ):
        path.write_text(json.dumps(record))
        assert sources.read(str(path))[0] == [record]
    path.write_text(json.dumps({"train": [{"a": 1}], "test": [{"a": 2}] * 2}))
    with pytest.raises(UserError, match=r"train \(1\), test \(2\)"):
        sources.read(str(path))
    path.write_text(json.dumps({"prompt": ["a"], "response": ["b", "c"]}))
    with pytest.raises(UserError, match="prompt: 1, response: 2"):
        sources.read(str(path))


# --- fields that change the meaning -------------------------------------------


@pytest.mark.parametrize(
    "record, field",
    [
        ({"messages": TURNS + REPLY, "label": False}, "label"),
        ({"text": "movie 1", "label": 1}, "label"),
        ({"text": "a", "tools": [{"name": "w"}]}, "tools"),
        ({"prompt": "a", "response": "b", "Rating": 3}, "Rating"),
        ({"prompt": "a", "response": "b", "images": ["x.png"]}, "images"),
        ({"prompt": "a", "response": "b", "rejected": "c"}, "rejected"),
        ({"messages": [*TURNS, {**REPLY[0], "score": 0}]}, "score"),
    ],
    ids=str,
)
def test_a_field_that_changes_the_meaning_stops_the_run(prepare, record, field):
    with pytest.raises(UserError) as caught:
        prepare(record, record, bad_rows=9)
    told = str(caught.value)
    assert f"  {field}: 2 of 2 records, first " in told and "line 1" in told
    assert f"--data.ignore={field}\n" in told
    assert prepare(record, ignore=field).report["kept"] == 1


def test_a_field_that_says_nothing_stops_nothing(prepare):
    record = {"prompt": "a", "response": "b", "label": None, "tools": []}
    record |= {"system": "", "source": "x", "images": []}
    assert prepare(record).report["kept"] == 1


def test_a_field_that_a_template_reads_is_read(prepare, tokenizer):
    found = prepare({"text": "a", "label": 1}, template="{text} is {label}")
    assert ids_of(found) == hand(tokenizer, "<bos>", "a is ", ["1", "<eos>"])


def test_a_context_that_a_template_leaves_out_stops_the_run(prepare):
    record = {"instruction": "a", "input": "b", "output": "c"}
    template = "{instruction}>{output}"
    with pytest.raises(UserError, match="input: 1 of 1 records"):
        prepare(record, template=template)
    assert prepare(record, template=template, ignore="input").report["kept"]
    assert prepare({**record, "input": ""}, template=template).report["kept"]
    whole = "{instruction}{context}>{output}"
    assert prepare(record, template=whole).report["kept"]


def test_a_late_label_is_found(prepare):
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(UserError, match="label: 1 of 151 .* line 151"):
        prepare(*[good] * 150, {**good, "label": 1})


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_weights_of_messages(prepare, tokenizer):
    user = {"role": "user", "content": "q"}
    both = {"weight": 0, "train": 1}
    for field in ({"weight": 0}, {"train": False}, both):
        chat = {"messages": [user, said("a", **field), user, said("b")]}
        ids, learn = conversation(tokenizer, "q", "a", "q", "b")
        first = learn.index(1.0)
        learn[first : first + 2] = [0.0, 0.0]
        assert ids_of(prepare(chat)) == (ids, learn)
    for bad in ({"weight": -1}, {"weight": "much"}, {"train": float("inf")}):
        with pytest.raises(UserError, match="turn 2 has"):
            prepare({"messages": [user, said("a", **bad)]})
    with pytest.raises(UserError, match="only the assistant's turns"):
        prepare({"messages": [{**user, "train": True}, said("a")]})


def test_weights_of_records_weigh_the_loss(prepare):
    records = [
        {"prompt": "a", "response": "b c", "weight": 0.5},
        {"prompt": "d", "response": "e"},
        {"prompt": "f", "response": "g", "weight": 0},
    ]
    found = prepare(*records, batch_size=2)
    assert found.report["weighted"] == 1 and found.report["kept"] == 2
    counts = [(found.learn[a:b] > 0).sum() for a, b in
              zip(found.starts, found.starts[1:])]  # fmt: skip
    assert found.weights.tolist() == [0.5 * counts[0], counts[1]]
    for size in (1, 2):
        batches = pipeline.train_batches(
            found, batch_size=2, micro_batch_size=size, seed=0, steps=1
        )
        total, seen = 0.0, []
        for _, _, weight in batches:
            total += weight.sum() / (2 // size)
            seen += sorted(set(weight[weight > 0].tolist()))
        assert total == pytest.approx(1)
        assert max(seen) == pytest.approx(2 * min(seen))


# --- tools --------------------------------------------------------------------

WEATHER = {
    "name": "w",
    "description": "the weather",
    "parameters": {"type": "object", "properties": {"city": {}}},
}
CALL = '<tool_call>\n{"name": "w", "arguments": {"city": "Oslo"}}\n</tool_call>'
OFFER = (
    "You can call these functions. Each line describes one of them in JSON.\n"
    + json.dumps(WEATHER)
    + "\nTo call a function, answer with its name and its arguments in this "
    'form:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
)


def call(id=None, arguments='{"city": "Oslo"}'):
    told = {"function": {"name": "w", "arguments": arguments}}
    return told | ({"id": id} if id else {})


@pytest.mark.parametrize(
    "called",
    [
        {"tool_calls": [call()]},
        {"tool_calls": [call("x", {"city": "Oslo"})]},
        {"function_call": {"name": "w", "arguments": '{"city": "Oslo"}'}},
    ],
    ids=str,
)
def test_a_tool_call_is_learned_in_one_form(prepare, tokenizer, called):
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Cold?"},
            {"role": "assistant", "content": None, **called},
            {"role": "tool", "content": [{"type": "text", "text": "4"}]},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }
    want = conversation(
        tokenizer,
        f"Be brief.\n\n{OFFER}\n\nCold?",
        CALL,
        "<tool_response>\n4\n</tool_response>",
        "Yes.",
    )
    assert ids_of(prepare(record)) == want
    # ShareGPT's spelling of the same.
    other = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Cold?"},
            {"from": "function_call", "value": json.dumps(call()["function"])},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    assert ids_of(prepare(other)) == want
    # And it is asked as it was learned.
    asked = templates.prompt(
        record["messages"][1:2], system="Be brief.", offered=record["tools"]
    )
    ids = tokens.encode([asked], tokenizer)[0].token_ids.tolist()
    assert ids == want[0][: len(ids)] and want[1][len(ids)] == 1.0


def test_parallel_calls_and_their_results(prepare, tokenizer):
    calls = [call("1"), call("2", '{"city": "Rome"}')]
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": calls,
            },
            {"role": "tool", "tool_call_id": "2", "content": {"celsius": 20}},
            {"role": "tool", "tool_call_id": "1", "content": None},
            {"role": "assistant", "content": "a"},
        ]
    }
    want = conversation(
        tokenizer,
        "q",
        f"Let me see.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}",
        "<tool_response>\n\n</tool_response>\n"
        '<tool_response>\n{"celsius": 20}\n</tool_response>',
        "a",
    )
    assert ids_of(prepare(record)) == want


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"tool_calls": [call(arguments="{broken")]}, "arguments is no JSON"),
        ({"tool_calls": [call(arguments="[1]")]}, "expected an object of arg"),
        ({"tool_calls": [{"function": {}}]}, "a function without a name"),
        ({"content": None}, "turn 2's text is missing"),
    ],
)
def test_a_call_that_is_none(prepare, message, reason):
    record = {"messages": [*TURNS, {"role": "assistant", **message}]}
    with pytest.raises(UserError, match=reason):
        prepare(record)
    record["tools"] = [{"description": "nameless"}]
    record["messages"][1] = REPLY[0]
    with pytest.raises(UserError, match="tool 1 has no name"):
        prepare(record)


# --- files and speakers -------------------------------------------------------


def zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


SHUT = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst
}  # fmt: skip


@pytest.mark.parametrize("form", SHUT)
def test_compressed_files(tmp_path, form):
    record = {"prompt": "é\u2028", "response": "x" * 9}
    line = json.dumps(record).encode() + b"\n"
    contents = {
        ".jsonl": line * 2,
        ".json": json.dumps([record] * 2).encode(),
        ".csv": b"prompt,response\n" + "é\u2028,xxxxxxxxx\n".encode() * 2,
    }
    for extension, content in contents.items():
        path = tmp_path / f"a{extension}.{form}"
        path.write_bytes(SHUT[form](content))
        assert sources.read(str(path))[0] == [record] * 2
        path.write_bytes(SHUT[form](content)[:-9])
        with pytest.raises(UserError, match="cannot be read to its end"):
            sources.read(str(path))
    path = tmp_path / f"a.docx.{form}"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown extension '.docx"):
        sources.read(str(path))


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_what_separates_cells_is_told_from_the_file(
    prepare, tokenizer, delimiter
):
    lines = [["prompt", "response"], ["a", '"b\nc"'], ["d, e; f", "g"]]
    if delimiter in ",;":
        lines[2][0] = f'"{lines[2][0]}"'
    text = "\n".join(delimiter.join(line) for line in lines)
    found = prepare(text.encode(), name="a.csv")
    assert ids_of(found) == conversation(tokenizer, "a", "b\nc")
    assert ids_of(found, 1) == conversation(tokenizer, "d, e; f", "g")
    named = {"\t": "tab"}.get(delimiter, delimiter)
    again = prepare(text.encode(), name="a.csv", delimiter=named)
    assert ids_of(again) == ids_of(found)


def test_a_comma_in_a_headers_name_separates_nothing(prepare, tokenizer):
    text = b'"q, or a, or b";response\na;b\n'
    named = {"prompt_field": "q, or a, or b", "response_field": "response"}
    found = prepare(text, name="a.csv", **named)
    assert ids_of(found) == conversation(tokenizer, "a", "b")


def test_a_tsv_is_parted_by_tabs(prepare, tokenizer):
    found = prepare(b"a, b\tc\n", name="a.tsv", columns="prompt,response")
    assert ids_of(found) == conversation(tokenizer, "a, b", "c")


def test_a_csv_without_a_header(prepare, tokenizer):
    text = b"how are you,fine\nwho are you,a model\n"
    with pytest.raises(UserError, match="--data.columns=prompt,response"):
        prepare(text, name="a.csv")
    found = prepare(text, name="a.csv", columns="prompt,response")
    assert ids_of(found) == conversation(tokenizer, "how are you", "fine")
    assert found.report["records"] == 2
    with pytest.raises(UserError, match="two columns are called 'prompt'"):
        prepare(text, name="a.csv", columns="prompt,prompt")


def test_speakers_of_real_dumps(prepare, tokenizer):
    for name in ("chatgpt", "bard", "bing", "AI", "GPT"):
        chat = [{"from": "human", "value": "q"}, {"from": name, "value": "a"}]
        found = prepare({"conversations": chat})
        assert ids_of(found) == conversation(tokenizer, "q", "a")
    chat = [{"from": "Alice", "value": "q"}, {"from": "Bob", "value": "a"}]
    with pytest.raises(UserError, match="--data.roles=Alice=user"):
        prepare({"conversations": chat})
    found = prepare({"conversations": chat}, roles="Alice=user, bob=assistant")
    assert ids_of(found) == conversation(tokenizer, "q", "a")
    with pytest.raises(UserError, match="'Bob' is not NAME=ROLE"):
        prepare({"conversations": chat}, roles="Alice=user,Bob")


def test_a_greeting_is_context(prepare, tokenizer):
    chat = [said("Hello!"), *TURNS, *REPLY]
    found = prepare({"messages": [*chat, *TURNS]})
    want = hand(
        tokenizer, "<bos>", "<start_of_turn>", "model\n", "Hello!",
        "<end_of_turn>", "\n",
    )  # fmt: skip
    ids, learn = conversation(tokenizer, "q", "a")
    assert ids_of(found) == (want[0] + ids[1:], want[1] + learn[1:])
    assert found.report["turns"] == {
        "greetings, not learned": 1,
        "turns after the last answer, left out": 1,
    }


def test_a_system_text_for_all(prepare, tokenizer):
    found = prepare({"prompt": "q", "response": "a"}, system="Be kind.")
    assert ids_of(found) == conversation(tokenizer, "Be kind.\n\nq", "a")
    # A template without a place for it: before the question, as when asked.
    found = prepare(
        {"prompt": "q", "response": "a"},
        system="Be kind.",
        template="{prompt}>{response}",
    )
    want = hand(tokenizer, "<bos>", "Be kind.\n\nq>", ["a", "<eos>"])
    assert ids_of(found) == want
    template = templates.load("{prompt}>{response}")
    asked = templates.prompt("q", template, system="Be kind.")
    ids = tokens.encode([asked], tokenizer)[0].token_ids.tolist()
    assert ids == want[0][: len(ids)] and want[1][len(ids)] == 1.0
    with pytest.raises(UserError, match="no field before the answer"):
        prepare({"text": "a"}, system="s", template="{text}")
    own = {"system": "Be brief.", "prompt": "q", "response": "a"}
    found = prepare(own, system="Be kind.")
    assert ids_of(found) == conversation(tokenizer, "Be brief.\n\nq", "a")
    found = prepare(own, template="{system}|{prompt}>{response}")
    assert ids_of(found) == hand(
        tokenizer, "<bos>", "Be brief.|q>", ["a", "<eos>"]
    )


# --- Jinja --------------------------------------------------------------------

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<start_of_turn>model\n{% generation %}{{ m.content }}<end_of_turn>"
    "{% endgeneration %}\n{% else %}<start_of_turn>user\n{{ m.content }}"
    "<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_generation_blocks_say_what_is_learned(prepare, tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED.replace("\n", "{{ '\\n' }}"))
    chat = {"messages": [*TURNS, said("a", weight=0), *TURNS, said("b<eos>")]}
    found = prepare(chat, template=str(path))
    ids, learn = ids_of(found)
    assert ids_of(prepare(chat)) == (ids, learn) and sum(learn) > 1
    # The same by transformers' own reader of such blocks.
    from transformers.utils.chat_template_utils import render_jinja_template

    text, [spans] = render_jinja_template(
        [[{**m, "content": m["content"]} for m in chat["messages"]]],
        chat_template=path.read_text(),
        return_assistant_tokens_mask=True,
        bos_token="<bos>",
    )
    assert [text[0][a:b] for a, b in spans] == [
        "a<end_of_turn>", "b<eos><end_of_turn>"
    ]  # fmt: skip
    path.write_text("{% generation %}x{% endgeneration %}")
    with pytest.raises(UserError, match="1 {% generation %} blocks for 2"):
        prepare(chat, template=str(path))


def test_what_hugging_faces_templates_call_is_there(prepare, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ strftime_now('%Y') | length }}{{ ['<é>'] | tojson }}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = templates.prompt("q", templates.load(str(path)))
    text = "".join(segment.text for segment in asked)
    assert text == '<bos>4["<é>"]user: q\nassistant: '
    path.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    record = {"system": "s", "prompt": "a", "response": "b"}
    with pytest.raises(UserError, match="no system .--data.template=gemma"):
        prepare(record, template=str(path))


def test_a_held_out_loss_is_the_weighted_mean(prepare):
    records = [{"prompt": "a", "response": "b", "weight": 3}]
    found = prepare(*records, *[{"prompt": "a", "response": "c d"}] * 2)
    batches = list(pipeline.eval_batches(found, batch_size=2))
    weights = [weight for _, _, weight in batches]
    assert np.mean([w.sum() for w in weights]) == pytest.approx(1)
    own = [set(w[w > 0].round(5).tolist()) for w in weights]
    assert max(set.union(*own)) == pytest.approx(3 * min(set.union(*own)), 1e-4)
