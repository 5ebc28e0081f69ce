"""Chat templates for other programs: what transformers makes of them."""

import pytest
from test_data_tokens import train_vocabulary

from keras_gemma_ft.config import Data
from keras_gemma_ft.data import chat_template, layouts, templates, tokens
from keras_gemma_ft.formats import tokenizer_files

transformers = pytest.importorskip("transformers")


def turn(role, text):
    return {"role": role, "content": text}


# The system's text, a second one, two questions in a row, white space.
CHATS = [
    [turn("user", "two plus two?")],
    [turn("user", " two?\n"), turn("assistant", "four. "), turn("user", "2?")],
    [turn("system", "Be brief."), turn("user", "two plus two?")],
    [turn("system", " Be brief.\n"), turn("user", "\n two?")],
    [turn("user", "one"), turn("user", "two"), turn("user", "three")],
    [turn("assistant", "hello"), turn("user", "two?")],
    [
        turn("user", "two?"),
        turn("assistant", "four"),
        turn("system", "Now in French."),
        turn("user", "two?"),
    ],
    [turn("developer", "Be brief."), turn("user", "é 😀 'a' \"b\" {{ c }}")],
    [turn("user", "two?"), turn("model", "four"), turn("user", "and?")],
    [turn("system", "Be brief."), turn("system", "Be kind."), turn("user", "")],
    [turn("system", ""), turn("user", "two?"), turn("user", "and three?")],
]


@pytest.fixture(scope="module")
def as_transformers(tmp_path_factory):
    """Token ids of a chat by transformers, of a template's source."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files.write_tokenizer(
        folder, train_vocabulary(), chat_template="x"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(source, chat, ask=True):
        return theirs.apply_chat_template(
            chat,
            chat_template=source,
            add_generation_prompt=ask,
            return_dict=False,
        )

    return ids


def ours(tokenizer, chat, spec="gemma", **kwargs):
    found = templates.prompt(chat, templates.load(spec), **kwargs)
    return tokens.encode([found], tokenizer)[0].token_ids.tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.Tokenizer(train_vocabulary())


@pytest.mark.parametrize("chat", CHATS)
def test_gemmas_turns(as_transformers, tokenizer, chat):
    theirs = as_transformers(chat_template.of("gemma"), chat)
    assert theirs == ours(tokenizer, chat)
    # As in llama.cpp and vLLM, a prompt has exactly one <bos>.
    assert theirs.count(tokenizer.bos) == 1


@pytest.mark.parametrize("chat", CHATS[:3])
def test_a_whole_conversation(as_transformers, tokenizer, chat):
    chat = [*chat, turn("assistant", " four.\n")]
    theirs = as_transformers(chat_template.of("gemma"), chat, ask=False)
    record, layout = {"messages": chat}, layout_of(chat)
    [example] = tokens.encode([templates.render(record, layout)], tokenizer)
    assert theirs == example.token_ids.tolist()


def layout_of(chat):
    return layouts.recognise([{"messages": chat}], Data())


@pytest.mark.parametrize("chat", CHATS)
def test_the_system_text_of_a_run(as_transformers, tokenizer, chat):
    system = "Answer \"in\" {{ one }} %} 'wörd' 😀.\nAlways"
    source = chat_template.of("gemma", system=system)
    if chat[0]["role"] == "developer":
        chat = [turn("user", "two?")]
    assert as_transformers(source, chat) == ours(tokenizer, chat, system=system)


def test_gemmas_turns_refuse_what_they_have_no_place_for(as_transformers):
    with pytest.raises(Exception, match="no turns of role tool"):
        as_transformers(chat_template.GEMMA, [turn("tool", "4")])
    with pytest.raises(Exception, match="must be a text"):
        as_transformers(chat_template.GEMMA, [turn("user", [{"type": "text"}])])


FORMATS = [
    "Q: {prompt}\\nA: {response}",
    "{system}\\n### {question} 'x' \"é😀\"\\n<start_of_turn>{answer}"
    "<end_of_turn>\\n",
    "Say {{this}}:\\t{text}",
    "<bos>{instruction} {input}{% {{ %}{output}<eos>",
]


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_format_strings(as_transformers, tokenizer, spec, system):
    if "%" in spec:
        spec = spec.replace("{% {{ %}", "{{% {{{{ %}}")
    source = chat_template.of(spec)
    for question in ("two plus two?", " é {{ 7*7 }}\n", ""):
        told = [turn("system", system)] if system else []
        before = [turn("user", "an older one"), turn("assistant", "four")]
        chat = [*told, *before, turn("user", question)]
        theirs = as_transformers(source, chat)
        assert theirs == ours(tokenizer, question, spec, system=system)
        # What is learned follows, up to an end.
        whole = as_transformers(source, [*chat, turn("assistant", "Four")])
        prompt, rest = whole[: len(theirs)], whole[len(theirs) :]
        assert prompt == theirs or "text" in spec
        ends = {tokenizer.eos, tokenizer.end_of_turn}
        assert len(ends & set(rest)) == 1


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}ä")
    assert chat_template.of(str(file)) == "{{ bos_token }}ä"
    assert chat_template.of(str(file), system="S").endswith("ä")
