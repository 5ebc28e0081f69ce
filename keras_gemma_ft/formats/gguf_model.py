"""A whole Gemma 2 <-> GGUF, as llama.cpp reads it (src/models/gemma2.cpp).

What is written is what llama.cpp's own conversion/gemma.py writes. Memory holds
one variable and its stored form, whatever the size of the model.
"""

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import gguf_file, gguf_names, names
from keras_gemma_ft.formats.atomic import replacing
from keras_gemma_ft.formats.huggingface import query_scalar
from keras_gemma_ft.formats.tokenizer_files import (
    CONTROL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    parse,
)

# What the gguf package can quantise to: kind -> general.file_type. The K-quants
# it reads, and does not write; llama.cpp's llama-quantize makes them of an f16.
KINDS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
    "bf16": 32,
}  # fmt: skip
# Scores of pieces that no merge makes, as the conversion of llama.cpp has them.
_ADDED, _PADDING = -1000.0, -10000.0
_CONTEXT = 8192
_LAYERS_OF_27B = 46


def write_gguf_model(path, model, proto, *, kind="f16", template="", name=""):
    """Writes a model for llama.cpp.

    Args:
        path: complete or absent afterwards.
        model: a reader; see `formats/models.py`.
        proto: bytes of the SentencePiece model in which control tokens are
            control pieces: `Tokenizer.control_proto`.
        kind: how matrices are stored, of `KINDS`; norms are float32.
        template: the chat template, Jinja.
        name: what the model is called.

    Raises:
        UserError: llama.cpp would not compute this model, or `kind` cannot
            hold it; all reasons are listed.
    """
    import gguf

    check(model, kind)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, "gemma2")
        _write_sizes(writer, model.backbone, KINDS[kind], name)
        _write_vocabulary(writer, proto, model.backbone["vocabulary_size"])
        if template:
            writer.add_chat_template(template)
        shapes = names.huggingface_shapes(model.backbone)
        for variable in model.paths:
            shape = shapes[names.huggingface_name(variable)]
            _announce(writer, variable, shape, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for variable in model.paths:
            writer.write_tensor_data(_stored(model, variable, stored))
        writer.close()


def check(model, kind):
    """UserError if `write_gguf_model` would refuse; nothing is read."""
    wrong = [*_refusals(model, kind)]
    if wrong:
        raise UserError("this model cannot be a GGUF:\n  " + "\n  ".join(wrong))


def _refusals(model, kind):
    """Why llama.cpp would compute something else."""
    import gguf

    sizes = model.backbone
    if kind not in KINDS:
        yield (
            f"--export.quantize={kind}: expected one of {', '.join(KINDS)}. "
            "K-quants are made of an f16 by llama.cpp: llama-quantize "
            "model-F16.gguf model-Q4_K_M.gguf Q4_K_M"
        )
        return
    scalar = sizes["head_dim"]
    if sizes["num_layers"] == _LAYERS_OF_27B:
        scalar = sizes["hidden_dim"] // sizes["num_query_heads"]
    if query_scalar(sizes) != scalar:
        yield (
            f"query_pre_attn_scalar is {query_scalar(sizes)}; llama.cpp takes "
            f"{scalar} for a Gemma 2 of these sizes"
        )
    for cap in ("attention_logit_soft_cap", "final_logit_soft_cap"):
        if not sizes[cap]:
            yield f"it has no {cap}; llama.cpp always has one"
    if names.HEAD in model.paths:
        yield (
            "it has a head of its own (lm_head); llama.cpp's Gemma 2 takes "
            "the token table. Export it as merged_hf"
        )
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0]
    rows = {"hidden size": sizes["hidden_dim"],
            "heads * head_dim": sizes["num_query_heads"] * sizes["head_dim"],
            "feed-forward width": sizes["intermediate_dim"] // 2}  # fmt: skip
    for what, size in rows.items():
        if size % block:
            yield (
                f"its {what}, {size}, is no multiple of {block}, as {kind} "
                f"wants it; take f16, bf16 or f32"
            )


def _write_sizes(writer, sizes, file_type, name):
    if name:
        writer.add_name(name)
    writer.add_type("model")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(sizes["hidden_dim"])
    writer.add_block_count(sizes["num_layers"])
    writer.add_feed_forward_length(sizes["intermediate_dim"] // 2)
    writer.add_head_count(sizes["num_query_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_file_type(file_type)
    writer.add_attn_logit_softcapping(sizes["attention_logit_soft_cap"])
    writer.add_final_logit_softcapping(sizes["final_logit_soft_cap"])
    writer.add_sliding_window(sizes["sliding_window_size"])
    writer.add_quantization_version(2)


def _write_vocabulary(writer, proto, words):
    """SentencePiece's pieces; rows of the table beyond them are unused."""
    model = parse(proto)
    tokens, scores, kinds = [], [], []
    for piece in model.pieces:
        text, score, kind = piece.piece, piece.score, piece.type
        if kind == CONTROL:
            score = _ADDED
        elif kind == USER_DEFINED:
            # llama.cpp finds these in a text before it replaces spaces.
            text, score = text.replace(SPACE, " "), _ADDED
        tokens.append(text.encode())
        scores.append(score)
        kinds.append(kind)
    for number in range(len(tokens), words):
        tokens.append(f"[PAD{number}]".encode())
        scores.append(_PADDING)
        kinds.append(UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    spec = model.trainer_spec
    for add, number in (
        (writer.add_bos_token_id, spec.bos_id),
        (writer.add_eos_token_id, spec.eos_id),
        (writer.add_unk_token_id, spec.unk_id),
        (writer.add_pad_token_id, spec.pad_id),
    ):
        if number >= 0:
            add(number)
    if b"<end_of_turn>" in tokens:
        writer.add_eot_token_id(tokens.index(b"<end_of_turn>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _kind(shape, stored):
    import gguf

    return gguf.GGMLQuantizationType.F32 if len(shape) == 1 else stored


def _matrix(path, array):
    """A variable as llama.cpp's tensor."""
    if path.endswith("/scale"):
        return array.astype("float32") + 1
    return names.to_huggingface(path, array)[1]


def _announce(writer, path, shape, stored):
    """Tells the writer of a tensor whose data comes later."""
    import gguf

    kind = _kind(shape, stored)
    nbytes, raw = int(np.prod(shape)) * 4, None
    if kind.name not in ("F32", "F16"):
        shape, raw = gguf.quant_shape_to_byte_shape(shape, kind), kind
        nbytes = int(np.prod(shape))
    elif kind.name == "F16":
        nbytes //= 2
    dtype = {"F32": "float32", "F16": "float16"}.get(kind.name, "uint8")
    writer.add_tensor_info(
        gguf_names.gguf_name(path), shape, np.dtype(dtype), nbytes, raw
    )


def _stored(model, path, stored):
    """One variable as its bytes in the file."""
    import gguf

    array = np.ascontiguousarray(_matrix(path, model.read(path)), "float32")
    kind = _kind(array.shape, stored)
    if kind.name in ("F32", "F16"):
        return array.astype(kind.name.replace("F", "float"))
    return gguf.quants.quantize(array, kind)


class GgufModel:
    """A GGUF model as a reader; see `formats/models.py`.

    Args:
        path: the file.

    Attributes:
        metadata: {key: value} of the file.

    Raises:
        UserError: it is no whole Gemma 2; all that is wrong is listed.
    """

    def __init__(self, path):
        self.file = gguf_file.read(path)
        self.metadata = self.file.metadata
        try:
            self.backbone = _backbone(self.metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a Gemma 2 of llama.cpp: {error!r}."
            ) from None
        known = gguf_names.paths(self.backbone)
        shapes = names.huggingface_shapes(self.backbone)
        held, wrong = self.file.tensors, []
        for name in held.keys() - known:
            wrong.append(f"{name}: unexpected")
        for name, variable in known.items():
            shape = shapes[names.huggingface_name(variable)]
            if name not in held:
                wrong.append(f"{name}: missing")
            elif held[name].shape != shape:
                wrong.append(f"{name}: {held[name].shape}, expected {shape}")
        if wrong:
            raise UserError(
                f"{path} is not a whole Gemma 2:\n  "
                + "\n  ".join(sorted(wrong)[:20])
            )
        self.paths = list(known.values())

    def read(self, path):
        """One variable in float32, with Keras's shape."""
        array = self.file.array(gguf_names.gguf_name(path))
        if path.endswith("/scale"):
            return array - 1
        name = names.huggingface_name(path)
        head = self.backbone["head_dim"]
        return names.to_keras(name, array, head_dim=head)[1]


def _backbone(told):
    """The arguments of `GemmaBackbone` that a GGUF's metadata names."""
    if told["general.architecture"] != "gemma2":
        raise ValueError(f"architecture {told['general.architecture']!r}")
    of = {key.removeprefix("gemma2."): value for key, value in told.items()}
    head = int(of["attention.key_length"])
    heads, hidden = int(of["attention.head_count"]), int(of["embedding_length"])
    layers, words = int(of["block_count"]), len(told["tokenizer.ggml.tokens"])
    for number in (head, heads, hidden, layers, words):
        if not 0 < number < 2**24:
            raise ValueError(f"a size of {number}")
    scalar = hidden // heads if layers == _LAYERS_OF_27B else head
    return {
        "vocabulary_size": words,
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": int(of["attention.head_count_kv"]),
        "hidden_dim": hidden,
        "intermediate_dim": 2 * int(of["feed_forward_length"]),
        "head_dim": head,
        "query_head_dim_normalize": scalar == head,
        "query_pre_attn_scalar": scalar,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "final_logit_soft_cap": float(of["final_logit_softcapping"]),
        "attention_logit_soft_cap": float(of["attn_logit_softcapping"]),
        "sliding_window_size": int(of["attention.sliding_window"]),
        "use_sliding_window_attention": True,
    }
