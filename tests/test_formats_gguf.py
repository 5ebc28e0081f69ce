"""GGUF on disk: round trips, the gguf package as witness, and files that lie."""

import struct
import time

import gguf
import numpy as np
import pytest
from test_data_tokens import train_vocabulary
from test_formats_adapters import BACKBONE, delta, make

from keras_gemma_ft.config import TARGETS, UserError
from keras_gemma_ft.data.tokens import Tokenizer
from keras_gemma_ft.formats import gguf_adapter, gguf_file, gguf_model, names

# Rows of 32 numbers, as codes want them, more words than pieces.
SIZES = BACKBONE | dict(
    hidden_dim=96, intermediate_dim=128, head_dim=32, vocabulary_size=351
)


class Model:
    """Random numbers as a reader."""

    def __init__(self, sizes, **changes):
        self.backbone = sizes | changes
        rng = np.random.default_rng(0)
        shapes = names.variable_shapes(self.backbone)
        self.held = {
            path: rng.normal(0, 0.5, shape).astype("float32")
            for path, shape in shapes.items()
        }
        self.paths = list(shapes)

    def read(self, path):
        return self.held[path]


@pytest.fixture(scope="module")
def proto():
    return Tokenizer(train_vocabulary()).control_proto


@pytest.fixture(scope="module")
def model():
    return Model(SIZES)


@pytest.fixture(scope="module")
def written(model, proto, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_model.write_gguf_model(
        path, model, proto, kind="f32", template="{{ x }}", name="mine"
    )
    return path


@pytest.mark.parametrize("style", ["keras", "standard"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets", [TARGETS, ("query", "value"), ("ffw_linear",)]
)
def test_adapters_come_back(tmp_path, style, rslora, targets):
    adapter = make(style, rslora=rslora, targets=targets)
    path = tmp_path / "adapter.gguf"
    gguf_adapter.write_gguf_adapter(path, adapter, name="a", base="b")
    back = gguf_adapter.read_gguf_adapter(path, BACKBONE)
    assert back.targets == adapter.targets
    for key in adapter.weights:
        want, got = delta(adapter, key), delta(back, key)
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=str(key))
    _as_llama_cpp_adds_it(path, adapter)


def _as_llama_cpp_adds_it(path, adapter):
    """alpha / r * B A of each tensor's own r, by the gguf package's reader."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(tensors) == 2 * len(adapter.weights)
    blocks = {"query": "attn_q", "ffw_linear": "ffn_down", "value": "attn_v"}
    for (layer, target), _ in adapter.weights.items():
        if target not in blocks:
            continue
        stem = f"blk.{layer}.{blocks[target]}.weight.lora_"
        a, b = (tensors[stem + x].astype("float64") for x in "ab")
        factor = alpha / len(a) if alpha else 1.0
        want = delta(adapter, (layer, target))
        path = f"decoder_block_0/attention/{target}/kernel"
        if target == "ffw_linear":
            path = f"decoder_block_0/{target}/kernel"
        want = names.to_huggingface(path, want)[1]
        np.testing.assert_allclose(factor * b @ a, want, atol=1e-6)


def test_adapters_for_something_else_are_refused(tmp_path):
    adapter, path = make("standard"), tmp_path / "adapter.gguf"
    gguf_adapter.write_gguf_adapter(path, adapter)
    small = BACKBONE | dict(num_layers=2, hidden_dim=44)
    with pytest.raises(UserError) as told:
        gguf_adapter.read_gguf_adapter(path, small)
    assert "blk.2.attn_q: the model has 2 layers" in str(told.value)
    assert "blk.0.attn_q: 40 -> 64, expected 44 -> 64" in str(told.value)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    for name in (
        "output.weight.lora_a",
        "blk.0.attn_q.weight.lora_b",
        "blk.0.ffn_norm.weight",
    ):
        writer.add_tensor(name, np.ones((2, 4), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError) as told:
        gguf_adapter.read_gguf_adapter(path, BACKBONE)
    for said in (
        "general.type is 'model', expected 'adapter'",
        "general.architecture is 'llama', expected 'gemma2'",
        "adapter.type is None",
        "output.weight.lora_a: an adapter on the head",
        "blk.0.attn_q.lora_a: missing",
        "blk.0.ffn_norm.weight: not a LoRA tensor",
    ):
        assert said in str(told.value)


def test_a_model_comes_back_equal(written, model):
    back = gguf_model.GgufModel(written)
    for name, value in back.backbone.items():
        assert model.backbone.get(name, value) == value, name
    assert back.paths == model.paths
    for path in model.paths:
        got, want = back.read(path), model.read(path)
        # A norm is stored as 1 + scale, in float32.
        np.testing.assert_allclose(got, want, rtol=0, atol=1.2e-7)
        if not path.endswith("/scale"):
            np.testing.assert_array_equal(got, want)


def test_the_gguf_package_reads_what_was_written(written, model, proto):
    reader = gguf.GGUFReader(written)
    told = {k: f.contents() for k, f in reader.fields.items()}
    for key, value in {
        "general.architecture": "gemma2",
        "general.name": "mine",
        "general.file_type": 0,
        "gemma2.attention.sliding_window": 8,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.key_length": 32,
        "gemma2.feed_forward_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ x }}",
    }.items():
        assert told[key] == value, key
    tokenizer = Tokenizer(train_vocabulary())
    assert told["tokenizer.ggml.eot_token_id"] == tokenizer.end_of_turn
    tokens, kinds = (
        told[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type")
    )
    assert len(tokens) == len(kinds) == 351
    assert kinds[tokenizer.end_of_turn] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("\n")] == gguf.TokenType.USER_DEFINED
    assert kinds[tokens.index("<0x41>")] == gguf.TokenType.BYTE
    assert (tokens[-1], kinds[-1]) == ("[PAD350]", gguf.TokenType.UNUSED)
    ours = gguf_file.read(written)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, ours.array(tensor.name))


# Largest error, as a share of the largest number of a row of 32.
STEPS = {"f16": 5e-4, "bf16": 4e-3, "q8_0": 8e-3, "q4_0": 0.13, "q4_1": 0.13,
         "q5_0": 0.07, "q5_1": 0.07}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
def test_codes_are_as_near_as_they_can_be(tmp_path, model, proto, kind):
    path = tmp_path / "model.gguf"
    gguf_model.write_gguf_model(path, model, proto, kind=kind)
    back = gguf_model.GgufModel(path)
    assert back.metadata["general.file_type"] == gguf_model.KINDS[kind]
    worst = 0.0
    for name in model.paths:
        got, want = back.read(name), model.read(name)
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= (2e-7 if name.endswith("/scale") else STEPS[kind]), name
        worst = max(worst, error)
    assert worst > STEPS[kind] / 20


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, proto):
    cases = [
        ({"query_pre_attn_scalar": 10}, "llama.cpp takes 32"),
        ({"attention_logit_soft_cap": None}, "always has one"),
        ({}, "expected one of f32"),
    ]
    for changes, said in cases:
        kind = "f16" if changes else "q4_k_m"
        with pytest.raises(UserError, match=said):
            gguf_model.write_gguf_model(
                tmp_path / "x.gguf", Model(SIZES, **changes), proto, kind=kind
            )
    odd = Model(SIZES, hidden_dim=40, head_dim=16)
    with pytest.raises(UserError, match="hidden size, 40, is no multiple"):
        gguf_model.write_gguf_model(
            tmp_path / "x.gguf", odd, proto, kind="q8_0"
        )
    headed = Model(SIZES)
    headed.paths.append("lm_head/embeddings")
    with pytest.raises(UserError, match="a head of its own"):
        gguf_model.write_gguf_model(tmp_path / "x.gguf", headed, proto)
    assert not any(tmp_path.iterdir())


def quickly_refused(path):
    began = time.monotonic()
    with pytest.raises(UserError):
        gguf_model.GgufModel(path)
    assert time.monotonic() - began < 2


def test_files_that_end_too_early_are_refused(tmp_path, written):
    data = written.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 60, 3), *range(60, len(data), len(data) // 40)]:
        path.write_bytes(data[:size])
        quickly_refused(path)


def test_lengths_that_lie_are_refused(tmp_path, written):
    """Every field of the header's first 4,000 bytes, made enormous."""
    data, path = written.read_bytes(), tmp_path / "lie.gguf"
    for at in (8, 16):  # counts of tensors and keys
        for lie in (2**60, 2**63, 2**32):
            path.write_bytes(
                data[:at] + struct.pack("<Q", lie) + data[at + 8 :]
            )
            quickly_refused(path)
    refused = 0
    rng = np.random.default_rng(0)
    header = data.index(b"tokenizer.ggml.scores")
    for at in rng.integers(24, header, 150):
        lie = struct.pack("<Q", int(rng.choice([2**60, 2**40, 2**20])))
        path.write_bytes(data[:at] + lie + data[at + 8 :])
        began = time.monotonic()
        try:
            found = gguf_model.GgufModel(path)
            for name in found.paths:
                found.read(name)
        except UserError:
            refused += 1
        assert time.monotonic() - began < 5
    # The rest fell into texts, which may say anything.
    assert refused > 20
    first = data.index(b"token_embd.weight") + len("token_embd.weight")
    for at in (0, 4, 12, 20, 24):  # dimensions, kind, offset
        path.write_bytes(
            data[: first + at] + b"\xff" * 4 + data[first + at + 4 :]
        )
        quickly_refused(path)


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (b"", b"GGUF", b"GGJT" + bytes(64), bytes(1000)):
        path.write_bytes(content)
        quickly_refused(path)
    with pytest.raises(UserError, match="cannot be read"):
        gguf_file.read(tmp_path / "none.gguf")
