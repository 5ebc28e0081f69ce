"""What others compute from the bytes that were written: logits of sequences.

Each witness opens an export by itself. transformers, PEFT, stock KerasHub and
llama.cpp are independent of us; `reference` is ours, in NumPy, and serves where
they are not installed or the model does not fit into memory.

A witness is a function of (written folder, `Case`) that returns logits: a list
of float32 arrays [T', V], of the last T' tokens of each sequence.
"""

import ctypes
import pathlib
import tempfile
import warnings
from typing import NamedTuple

import numpy as np

from keras_gemma_ft import runtime
from keras_gemma_ft.checking import reference
from keras_gemma_ft.formats import (
    adapters,
    gguf_adapter,
    gguf_model,
    huggingface,
    models,
    names,
)
from keras_gemma_ft.formats import keras_preset as presets
from keras_gemma_ft.model import forward

# Tokens of a sequence whose logits are compared, from its end: 8 prompts of
# 2B's words are 262 MB then.
LAST = 32


class Case(NamedTuple):
    """What is compared.

    Attributes:
        base: reader of the base model; see `formats/models.py`.
        sequences: lists of token ids.
        tokenizer: `data.tokens.Tokenizer`.
    """

    base: object
    sequences: list
    tokenizer: object = None


def fits(model, bytes_each=4, copies=1.3):
    """Whether a whole model fits into what memory is left.

    Args:
        model: a reader.
        bytes_each: of a number.
        copies: what there is beside the weights, as a factor.
    """
    free = runtime.available_bytes()
    return free is None or models.parameters(model) * bytes_each * copies < free


def by_reference(model, sequences):
    """The last logits of each sequence, by our NumPy reader."""
    found = reference.logits(model, sequences)
    return [np.asarray(x[-LAST:], "float32") for x in found]


def by_keras(causal_lm, sequences):
    """The last logits of each sequence, by the model that is trained."""
    from keras import ops

    backbone = causal_lm.backbone
    ids, lengths = _padded(sequences)
    positions = np.broadcast_to(
        np.arange(ids.shape[1], dtype="int32"), ids.shape
    )
    segments = (positions < lengths[:, None]).astype("int32")
    hidden = ops.stop_gradient(
        forward.hidden_states(backbone, ids, segments, positions)
    )
    found = []
    for i, length in enumerate(lengths):
        some = hidden[i, max(0, length - LAST) : length]
        scores = ops.stop_gradient(forward.logits(backbone, some))
        found.append(np.array(ops.convert_to_numpy(scores), "float32"))
    return found


def by_transformers(model, sequences):
    """The last logits of each sequence, by a model of transformers or PEFT."""
    import torch

    with torch.no_grad():
        return [
            model(torch.tensor([sequence]))
            .logits[0, -LAST:]
            .float()
            .cpu()
            .numpy()
            for sequence in map(list, sequences)
        ]


def quiet():
    """transformers, without its bars and its notes to programmers; or None."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    return transformers


def transformers_folder(folder, case):
    """A merged folder, opened by transformers in float32."""
    import torch

    transformers = quiet()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return by_transformers(model.eval(), case.sequences)


def peft_folder(folder, case):
    """A PEFT folder, opened by PEFT over the base in transformers."""
    import peft

    model = peft.PeftModel.from_pretrained(_transformers(case.base), folder)
    return by_transformers(model.eval(), case.sequences)


def _transformers(base):
    """The base as transformers computes it, its weights from our reader."""
    import torch

    transformers = quiet()
    told = huggingface.huggingface_config(base.backbone)
    told["tie_word_embeddings"] = names.HEAD not in base.paths
    weights = {}
    for path in base.paths:
        array = models.cast(base.read(path), "float32")
        name, array = names.to_huggingface(path, array)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        None,
        config=transformers.Gemma2Config(**told),
        state_dict=weights,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return model.eval()


def stock_keras(folder, case):
    """`adapter.lora.h5`, loaded as its reader would: by plain KerasHub."""
    import keras
    import keras_hub

    path = _file(folder, ".lora.h5")
    with tempfile.TemporaryDirectory() as place:
        # KerasHub knows one way in: a preset on disk.
        preset = _as_preset(case, pathlib.Path(place) / "base")
        model = keras_hub.models.GemmaCausalLM.from_preset(
            str(preset), preprocessor=None, dtype="float32"
        )
    adapter = adapters.read_keras(path, case.base.backbone)
    model.backbone.enable_lora(
        adapter.rank, target_layer_names=list(adapter.targets)
    )
    model.backbone.load_lora_weights(str(path))
    return _stock(model, case.sequences, keras)


def keras_preset(folder, case):
    """A preset folder, loaded by plain KerasHub."""
    import keras
    import keras_hub

    model = keras_hub.models.GemmaCausalLM.from_preset(
        str(folder), preprocessor=None, dtype="float32"
    )
    return _stock(model, case.sequences, keras)


def _stock(model, sequences, keras):
    ids, lengths = _padded(sequences)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    scores = model({"token_ids": ids, "padding_mask": mask.astype("int32")})
    scores = keras.ops.convert_to_numpy(keras.ops.stop_gradient(scores))
    return [
        np.array(row[max(0, length - LAST) : length], "float32")
        for row, length in zip(scores, lengths)
    ]


def _padded(sequences):
    """Sequences as one array, int32 [N, T], and their lengths: one program."""
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.zeros((len(sequences), lengths.max()), "int32")
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = sequence
    return ids, lengths


def _as_preset(case, folder):
    """The base as a preset's folder: its own, or one that is written."""
    if isinstance(case.base, presets.KerasPreset):
        return case.base.folder
    presets.write_preset(
        folder,
        case.base,
        case.tokenizer.proto,
        dtype="float32",
        shards=models.split(case.base, "float32", 2**62),
        versions=runtime.versions(),
    )
    return folder


def llama_model(folder, case):
    """A merged GGUF, opened by llama.cpp."""
    return _llama(_file(folder, ".gguf"), case.sequences)


def llama_adapter(folder, case):
    """A GGUF adapter, opened by llama.cpp over the base as a GGUF."""
    with tempfile.TemporaryDirectory() as place:
        base = pathlib.Path(place) / "base.gguf"
        # 2B in float32 would take 10 GB of the disk.
        kind = "f32" if models.parameters(case.base) < 5e8 else "f16"
        gguf_model.write_gguf_model(
            base, case.base, case.tokenizer.control_proto, kind=kind
        )
        return _llama(
            base, case.sequences, lora_path=str(_file(folder, ".gguf"))
        )


# C keeps the address of this function only.
_SILENT = []


def _llama(path, sequences, **options):
    import llama_cpp

    if not _SILENT:  # It would tell programmers of its caches.
        _SILENT.append(llama_cpp.llama_log_callback(lambda *told: None))
        llama_cpp.llama_log_set(_SILENT[0], ctypes.c_void_p(0))
    model = llama_cpp.Llama(
        str(path),
        n_ctx=max(64, *map(len, sequences)),
        logits_all=True,
        verbose=False,
        **options,
    )
    found = []
    for sequence in sequences:
        model.reset()
        model.eval(list(sequence))
        found.append(np.array(model.scores[: len(sequence)][-LAST:]))
    model.close()
    return found


def _adapted(read):
    """A reader of the base with the adapter that `read(folder, case)` gives."""
    return lambda folder, case: models.Merged(case.base, read(folder, case))


def _file(folder, ending):
    [path] = pathlib.Path(folder).glob(f"*{ending}")
    return path


def _gguf_adapter(folder, case):
    return gguf_adapter.read_gguf_adapter(
        _file(folder, ".gguf"), case.base.backbone
    )


def _gguf_model(folder, case):
    return gguf_model.GgufModel(_file(folder, ".gguf"))


# Our own readers: function of (folder, case) -> reader of what was written.
READERS = {
    "peft": _adapted(lambda f, c: adapters.read_peft(f, c.base.backbone)),
    "keras": _adapted(
        lambda f, c: adapters.read_keras(_file(f, ".lora.h5"), c.base.backbone)
    ),
    "gguf_adapter": _adapted(_gguf_adapter),
    "merged_hf": lambda folder, case: models.open(folder),
    "merged_keras": lambda folder, case: models.open(folder),
    "gguf": _gguf_model,
    "ollama": _gguf_model,
}
