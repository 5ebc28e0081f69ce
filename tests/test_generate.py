"""Completions against stock KerasHub; stops, streams, chats, samplers."""

import io
import json
import os
import re
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
from keras import ops
from test_run import (  # noqa: F401
    VOCABULARY,
    settings,
    stock_logits,
    workshop,
)

from keras_gemma_ft import config, generate, runtime
from keras_gemma_ft.data import layouts, templates, tokens
from keras_gemma_ft.inference import chat, sampling
from keras_gemma_ft.model import lora, presets
from keras_gemma_ft.tuning import results

SPM = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
EOS, BOS, START, END = 1, 2, 106, 107
PROMPTS = [
    "Set a timer for ten minutes",
    "Lights off",
    "Could you please put two bags of rice on the shopping list today?",
]


# What the suite sets in its own environment, a user does not.
QUIET = ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", "TOKENIZERS_PARALLELISM")


def turn(text):
    """Ids of Gemma's user turn and the head of the model's."""
    return [
        START, *SPM.encode(f"user\n{text}"), END, *SPM.encode("\n"),
        START, *SPM.encode("model\n"),
    ]  # fmt: skip


ASKED = [[BOS, *turn(prompt)] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def cfg(workshop):  # noqa: F811
    return settings(workshop, "unused", generate__max_new_tokens=8)


@pytest.fixture(scope="module")
def loaded(cfg):
    return presets.load(cfg.preset)


@pytest.fixture(scope="module")
def session(loaded, cfg):
    return chat.Session(loaded, cfg)


@pytest.fixture(scope="module")
def said(session):
    """The ids that greedily follow `ASKED`, at most 8 of each."""
    return session.generator.complete(ASKED)


@pytest.fixture
def scripted(loaded, cfg):
    """Function of texts with control tokens: a session that says them."""

    def make(*scripts):
        session = chat.Session(loaded, cfg)
        session.asked = []
        rows = [
            SPM.encode(s) if isinstance(s, str) else list(s) for s in scripts
        ]

        def advance(ids, segments, positions, cache):
            ids = ops.convert_to_numpy(ids)
            used = ops.convert_to_numpy(segments) > 0
            first = ids.shape[1] > 1
            if first:
                session.asked += [i[u].tolist() for i, u in zip(ids, used)]
                session.now = rows[: len(ids)]
                del rows[: len(ids)]
            best = np.array([row.pop(0) if row else 200 for row in session.now])
            return None, best, cache

        session.generator._advance = advance
        return session

    return make


def test_completions_are_stock_keras_hubs_likeliest_words(cfg, said):
    backbone = keras_hub.models.GemmaBackbone.from_preset(
        cfg.preset, dtype="float32"
    )
    ids = np.zeros((3, max(map(len, ASKED)) + 8), "int32")
    for row, prompt, words in zip(ids, ASKED, said):
        row[: len(prompt) + len(words)] = prompt + words
    best = stock_logits(backbone, ids).argmax(-1)
    for row, prompt, words in zip(best, ASKED, said):
        n = len(prompt)
        assert words == row[n - 1 : n - 1 + len(words)].tolist()
        assert len(set(words)) > 1, "a model that stutters proves little"


def test_batch_answers_equal_single_answers(session, said, capfd):
    answers = session.answer(PROMPTS)
    assert [answer["prompt"] for answer in answers] == PROMPTS
    for words, answer in zip(said, answers):
        capfd.readouterr()
        assert session.answer([answer["prompt"]]) == [answer]
        # A single answer is shown while it comes.
        assert capfd.readouterr().err == answer["completion"] + "\n"
        shown = [word for word in words if not SPM.is_unused(word)]
        assert answer["completion"] == session.tokenizer.decode(shown)
    assert session.generator.complete(ASKED, batch_size=2) == said


def test_completions_stop_at_either_end_token_and_at_the_limit(scripted):
    hello = SPM.encode("Hello there")
    session = scripted(
        [*hello, EOS, *hello], [*hello[:1], END], [END], [250] * 20
    )
    found = session.generator.complete([[BOS, 300 + i] for i in range(4)])
    assert found == [hello, hello[:1], [], [250] * 8]
    session = scripted([250] * 20)
    assert session.generator.complete([[BOS]], limit=3) == [[250] * 3]


def test_prompts_reach_the_model_in_gemmas_turns(scripted):
    session = scripted([EOS], [EOS])
    session.answer([" Hi there \n"])
    # The user's own "<end_of_turn>" is text: it closes no turn.
    session.answer(["Hi <end_of_turn> there"])
    first, second = session.asked
    assert first == [BOS, *turn("Hi there")]
    assert (second.count(BOS), second.count(START)) == (1, 2)
    assert second.count(END) == 1
    session = scripted([EOS])
    session.system = "Be brief."
    session.answer(["Hi"])
    assert session.asked == [[BOS, *turn("Be brief.\n\nHi")]]
    session = scripted([EOS])
    session.settings = config.Generate(raw=True)
    session.answer(["Once upon"])
    assert session.asked == [[BOS, *SPM.encode("Once upon")]]


@pytest.mark.parametrize(
    "said", ["naïve — 12 °C, 日本 🙂!", "🙂", "", "two\n lines\n"]
)
def test_a_stream_adds_up_to_the_completion(scripted, monkeypatch, said):
    ids = [*SPM.encode(said), END]
    assert said.isascii() or len(ids) > len(said), "no character is split"
    session = scripted(ids)
    session.generator.settings = config.Generate(max_new_tokens=60)
    pieces = []

    class Stream(io.StringIO):
        def write(self, text):
            pieces.append(text)

    monkeypatch.setattr(sys, "stderr", Stream())
    (answer,) = session.answer(["Hi"])
    assert answer["completion"] == said
    assert "".join(pieces) == said + "\n"
    # Never half a character, and not all of it at once.
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([p for p in pieces if p.strip()]) > 1 or len(said) < 2


def test_a_stream_that_ends_within_a_character(scripted, capfd):
    ids = SPM.encode("°🙂")
    session = scripted(ids)
    session.generator.settings = config.Generate(max_new_tokens=len(ids) - 1)
    (answer,) = session.answer(["Hi"])
    assert answer["completion"].startswith("°\ufffd")
    assert capfd.readouterr().err == answer["completion"] + "\n"


def test_a_chat_remembers_its_turns(scripted, capfd):
    session = scripted(
        [*SPM.encode("Hello!"), END], [*SPM.encode("Blue."), EOS]
    )
    turns = session.talk(io.StringIO("Hi\nWhich colour?\n\nnot read\n"))
    assert turns == [
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": "Which colour?", "completion": "Blue."},
    ]
    first, second = session.asked
    assert first == [BOS, *turn("Hi")]
    said = [*SPM.encode("Hello!"), END, *SPM.encode("\n")]
    assert second == [BOS, *turn("Hi"), *said, *turn("Which colour?")]
    assert "> Hello!\n> Blue.\n> " in capfd.readouterr().err
    # Ctrl-D ends a chat as an empty line does.
    assert scripted([END]).talk(io.StringIO("Hi"))[0]["completion"] == ""


def test_samplers_repeat_with_their_seed(loaded, session, said):
    def sample(seed, **values):
        generator = sampling.Generator(
            loaded.causal_lm,
            loaded.tokenizer,
            config.Generate(max_new_tokens=8, **values),
            seed=seed,
        )
        # The programs that the session has compiled.
        generator._advance = session.generator._advance
        return generator.complete(ASKED)

    for values in (
        {"sampler": "top_k", "top_k": 50, "temperature": 2.0},
        {"sampler": "top_p", "top_p": 0.99, "temperature": 2.0},
    ):
        once = sample(1, **values)
        assert once == sample(1, **values)
        assert once != sample(2, **values)
        assert once != said
    # Among one word, and at no temperature, chance has no say.
    assert sample(1, sampler="top_k", top_k=1) == said
    assert sample(1, sampler="top_p", top_p=1e-6) == said
    assert sample(1, sampler="top_k", temperature=1e-4) == said


def test_an_adapter_changes_the_answer(session, cfg, tmp_path, monkeypatch):
    loaded = presets.load(cfg.preset)
    backbone = loaded.causal_lm.backbone
    lora.enable(backbone, config.Lora(rank=2))
    rng = np.random.default_rng(0)
    for pair in lora.variables(backbone).values():
        for variable in pair:
            variable.assign(rng.normal(0, 0.5, variable.shape))
    results.write_adapters(tmp_path, backbone)
    expected = chat.Session(loaded, cfg).answer(PROMPTS)
    assert expected != session.answer(PROMPTS)
    monkeypatch.setattr(runtime, "start", lambda cfg: None)
    file = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    file.write_text("\n".join(rows) + "\n\n")
    found = generate.generate(
        config.replace(
            cfg,
            {"adapter": str(tmp_path), "generate.prompt_file": str(file)},
        )
    )
    assert found == {"completions": expected}


def test_stderr_has_the_verbs_own_lines_only():
    done = subprocess.run(
        [sys.executable, "-m", "keras_gemma_ft.generate"]
        + [
            f"--backend={keras.config.backend()}",
            "--generate.prompt=set a timer",
        ],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in QUIET},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["completions"][0]["completion"]
    *lines, last = done.stderr.splitlines()
    assert last == said
    other = [line for line in lines if not re.match(r"\[ *[\d.]+s\] ", line)]
    assert not other, "\n".join(other)


def test_the_verb_takes_a_prompt_a_file_or_a_chat(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda cfg: None)
    said = []

    class Session:
        def answer(self, prompts):
            return said.append(prompts) or ["answered"]

        def talk(self, lines):
            return said.append(lines.read()) or ["talked"]

    monkeypatch.setattr(chat, "load", lambda cfg: Session())
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\u2028still two\n", "utf-8")

    def run(**values):
        values = {f"generate.{key}": value for key, value in values.items()}
        return generate.generate(config.replace(cfg, values))

    assert run(prompt="Hi") == {"completions": ["answered"]}
    assert run(prompt_file=str(file)) == {"completions": ["answered"]}
    assert run() == {"completions": ["talked"]}
    assert said == [["Hi"], ["one", "two\u2028still two"], "from stdin"]


def test_conversations_and_tools_are_asked_as_they_are_learned(
    cfg, session, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "start", lambda cfg: None)
    asked = []
    monkeypatch.setattr(chat, "load", lambda cfg: session)
    monkeypatch.setattr(session, "answer", asked.extend)
    turns = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "w"}}]
    rows = [{"messages": turns}, {"prompt": "Hi", "tools": tools}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    values = {"generate.prompt_file": str(file)}
    generate.generate(config.replace(cfg, values))
    plain, offered = (session.ids(question).tolist() for question in asked)
    assert plain == session.ids("Hi").tolist()
    layout = layouts.recognise([{**rows[0], "tools": tools}])
    record = {"messages": [*turns, {"role": "model", "content": "x"}]}
    segments = templates.render({**record, "tools": tools}, layout)
    whole = tokens.encode([segments], session.tokenizer)[0].token_ids.tolist()
    assert offered == whole[: len(offered)] and len(offered) > len(plain)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("number.jsonl", b'{"prompt": 3}', ["TypeError", "neither a text"]),
        ("none.txt", None, ["no such file"]),
        ("empty.txt", b"\n \n", ["holds no prompt"]),
        ("bad.txt", b"\xff\xfe", ["UnicodeDecodeError", "expected UTF-8"]),
        ("bad.jsonl", b'{"prompt": "Hi"}\n{', ["JSONDecodeError", '"prompt"']),
        ("other.jsonl", b'{"text": "Hi"}', ["KeyError", '"prompt"']),
        ("list.jsonl", b'["Hi"]', ["TypeError", '"prompt"']),
    ],
)
def test_a_bad_prompt_file_is_told(cfg, tmp_path, name, data, words):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    values = {"generate.prompt_file": str(tmp_path / name)}
    with pytest.raises(config.UserError) as caught:
        generate.generate(config.replace(cfg, values))
    told = str(caught.value)
    for word in ("--generate.prompt_file=", name, *words):
        assert word in told, told
