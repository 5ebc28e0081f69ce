"""llama.cpp computes, tokenises and continues as we do.

Runs where llama-cpp-python is installed: `pip install llama-cpp-python`, which
compiles for some minutes.
"""

import numpy as np
import pytest
import tiny
from test_data_tokens import train_vocabulary

from keras_gemma_ft import config
from keras_gemma_ft.checking import reference, witnesses
from keras_gemma_ft.config import TARGETS
from keras_gemma_ft.data import templates, tokens
from keras_gemma_ft.formats import (
    adapters,
    gguf_adapter,
    gguf_model,
    models,
    names,
)
from keras_gemma_ft.inference import sampling
from keras_gemma_ft.model import lora, preset_source, presets

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.once

TEXTS = [
    "Set a timer for ten minutes",
    "two  spaces,   three and\n\nnew lines\n",
    " a space first",
    "naïve café 😊 日本語 \t tab",
    "1234567890 + 42 = ?",
    "<b>bold</b> & <start_of_turn> typed by a user",
    "",
    "user\nmodel\n",
    "Der Überfluß; ÆØÅ",
    "x" * 70,
]
# It looks GELU up in a table of float16, which costs up to 0.009 at logits of
# 15; twice that where random weights are so large that both soft caps bite.
CLOSE = {"embedded": 9e-3, "shaped": 2e-2}


@pytest.fixture(scope="module", params=["embedded", "2b"])
def base(request, tmp_path_factory):
    """The folder of a model: the embedded one, or shaped as the 2B is."""
    if request.param == "embedded":
        return preset_source.folder(config.EMBEDDED_PRESET)
    return tiny.save(
        tmp_path_factory.mktemp("shaped"),
        gain=1.0,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        hidden_size=96,
        intermediate_size=384,
        query_pre_attn_scalar=32,
    )


@pytest.fixture(scope="module")
def tokenizer(base):
    return presets.tokenizer(base)


def make(backbone, style):
    kernels, rng = names.kernel_shapes(backbone), np.random.default_rng(1)
    weights = {
        (layer, target): tuple(
            rng.normal(0, 0.06, shape).astype("float32")
            for shape in adapters.pair_shapes(style, target, kernels[target], 4)
        )
        for layer in range(backbone["num_layers"])
        for target in TARGETS
    }
    return adapters.Adapter(style, 4, 6.0, False, 0.0, TARGETS, weights)


def greedy(model, ids, count):
    """llama.cpp's likeliest words after some ids, one at a time."""
    found, model_ids = [], list(ids)
    model.reset()
    model.eval(model_ids)
    for _ in range(count):
        best = int(np.argmax(model.scores[model.n_tokens - 1]))
        found.append(best)
        model.eval([best])
    return found


def opened(path, **options):
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **options,
    )


@pytest.mark.parametrize("style", ["keras", "standard"])
def test_llama_cpp_continues_as_we_do(base, tokenizer, tmp_path, style):
    reader = models.open(base)
    adapter = make(reader.backbone, style)
    words = tokenizer.control_proto
    merged = models.Merged(reader, adapter)
    gguf_model.write_gguf_model(tmp_path / "b.gguf", reader, words, kind="f32")
    gguf_model.write_gguf_model(tmp_path / "m.gguf", merged, words, kind="f32")
    gguf_adapter.write_gguf_adapter(tmp_path / "a.gguf", adapter)
    # Longer than the window of either model.
    ids = [tokenizer.bos, *tokenizer.encode(" ".join(TEXTS[:5]) * 2)][:100]
    assert len(ids) > reader.backbone["sliding_window_size"]
    [want] = reference.logits(merged, [ids])
    [plain] = reference.logits(reader, [ids])
    loaded = presets.load(str(base), dtype="float32")
    lora.enable(loaded.causal_lm.backbone, lora.settings_of(adapter))
    lora.write(loaded.causal_lm.backbone, adapter)
    generator = sampling.Generator(
        loaded.causal_lm, tokenizer, config.Generate()
    )
    generator.stops = set()
    [ours] = generator.complete([ids], limit=32)
    for how, model in {
        "base and adapter": opened(
            tmp_path / "b.gguf", lora_path=str(tmp_path / "a.gguf")
        ),
        "merged": opened(tmp_path / "m.gguf"),
    }.items():
        model.reset()
        model.eval(ids)
        got = np.array(model.scores[: len(ids)])[:, : want.shape[-1]]
        close = CLOSE["shaped" if "shaped" in str(base) else "embedded"]
        scale = max(1.0, np.abs(want).max() / 15)
        tiny.close(how, got, want, atol=close * scale)
        assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.97
        assert np.abs(got - plain).max() > 0.5
        assert greedy(model, ids, 32) == ours, how
        model.close()


def test_llama_cpp_finds_our_tokens(base, tokenizer, tmp_path):
    path = tmp_path / "m.gguf"
    gguf_model.write_gguf_model(
        path, models.open(base), tokenizer.control_proto, kind="f32"
    )
    model = opened(path)
    assert model.token_bos() == tokenizer.bos
    assert model.token_eos() == tokenizer.eos
    for text in TEXTS:
        got = model.tokenize(text.encode(), add_bos=False, special=False)
        assert got == tokenizer.encode(text), text
        chat = templates.prompt(text or "Hi")
        [example] = tokens.encode([chat], tokenizer)
        if "<start_of_turn>" in text:
            continue  # llama.cpp finds it in a user's text; we do not.
        typed = "".join(segment.text for segment in chat[1:])
        got = model.tokenize(typed.encode(), add_bos=True, special=True)
        assert got == list(example.token_ids), text
    model.close()


def test_the_witness_opens_an_adapter_and_a_model(tmp_path):
    folder = preset_source.folder(config.EMBEDDED_PRESET)
    reader, words = models.open(folder), presets.tokenizer(folder)
    adapter = make(reader.backbone, "standard")
    ids = [words.bos, *words.encode("Set a timer")]
    case = witnesses.Case(reader, [ids], words)
    gguf_adapter.write_gguf_adapter(tmp_path / "a.gguf", adapter)
    [got] = witnesses.llama_adapter(tmp_path, case)
    [want] = witnesses.by_reference(models.Merged(reader, adapter), [ids])
    tiny.close("adapter", got, want, atol=2 * CLOSE["embedded"])


def test_vocabulary_of_the_tests_has_every_kind_of_piece():
    """What the tokens above are compared with is worth comparing."""
    tokenizer = tokens.Tokenizer(train_vocabulary())
    assert len(tokenizer.encode("😊")) == 4  # bytes
    assert tokenizer.encode("\n") == [tokenizer.id("\n")]
