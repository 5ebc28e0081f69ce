"""An adapter folder of mlx-lm, told in PEFT's words.

mlx-lm writes `adapters.safetensors` and an `adapter_config.json` of its own:
`fine_tune_type`, `num_layers` and `lora_parameters` with rank, scale, dropout.
A linear layer has `lora_a` [in, r], `lora_b` [r, out] and for DoRA `m` [out];
an embedding `lora_a` [V, r], `lora_b` [r, D], and its head is the embedding.
The scale multiplies as it is (mlx_lm/tuner/lora.py, dora.py).
"""

import re

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import peft_tensors
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.formats.peft_config import CONFIG, is_number

WEIGHTS = "adapters.safetensors"
# Stands for a peft_type.
KIND = "MLX"
_TYPES = ("lora", "dora", "full")
_PARTS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
# What quantized weights have beside them.
_QUANTIZED = re.compile(r".*\.(?:scales|biases)")


def read(folder):
    """(`adapter_config.json` as PEFT would write it, tensors of PEFT's names).

    Args:
        folder: a `pathlib.Path` that holds `WEIGHTS`.

    Raises:
        UserError: a setting or a file that cannot be followed.
    """
    told = read_json(folder / CONFIG)
    kind = told.get("fine_tune_type", "lora")
    settings = told.get("lora_parameters")
    wrong = []
    if kind not in _TYPES:
        wrong.append(f"fine_tune_type={kind!r}: expected {', '.join(_TYPES)}")
    if kind != "full":
        settings = settings if type(settings) is dict else {}
        for name, least in (("rank", 1), ("scale", None), ("dropout", 0)):
            value = settings.get(name, 0.0 if name == "dropout" else None)
            if not is_number(value) or (least is not None and value < least):
                wrong.append(
                    f"lora_parameters.{name}={value!r}: expected a number"
                )
    if wrong:
        raise UserError(
            f"{folder / CONFIG} of an MLX adapter asks for what is not "
            "supported:\n  " + "\n  ".join(wrong) + "\nFuse it with "
            "mlx_lm.fuse --dequantize and pass the folder as --preset."
        )
    tensors, _ = peft_tensors.read(folder / WEIGHTS)
    quantized = [name for name in tensors if _QUANTIZED.fullmatch(name)]
    if quantized:
        raise UserError(
            f"{folder / WEIGHTS} holds quantized weights "
            f"({', '.join(quantized[:4])}), which only MLX reads. Fuse it with "
            "mlx_lm.fuse --dequantize and pass the folder as --preset."
        )
    if kind != "full":
        _check_ranks(folder / WEIGHTS, tensors, settings["rank"])
    found = dict(_renamed(name, array) for name, array in tensors.items())
    config = {
        "peft_type": KIND,
        "base_model_name_or_path": told.get("model"),
        "use_dora": kind == "dora",
    }
    if kind != "full":
        rank = settings["rank"]
        config |= {
            "lora_alpha": settings["scale"] * rank,
            "lora_dropout": settings.get("dropout", 0.0),
        }
    return config, found


def _renamed(name, array):
    """A tensor with PEFT's name, and as PEFT would hold it."""
    module, _, part = name.rpartition(".")
    if part not in _PARTS:
        return name, array
    if module.endswith("embed_tokens") and part in ("lora_a", "lora_b"):
        # A word's row is (lora_a lora_b)[word]: the other way round.
        other = {"lora_a": "lora_b", "lora_b": "lora_a"}[part]
        return f"{module}.{_PARTS[other]}", array
    return f"{module}.{_PARTS[part]}", array.T


def _check_ranks(file, tensors, rank):
    # The scale is for this rank.
    wrong = [
        f"{name}: shape {array.shape}, expected rank {rank}"
        for name, array in tensors.items()
        if name.endswith(".lora_a") and array.shape[-1:] != (rank,)
    ]
    if wrong:
        raise UserError(
            f"{file} does not fit its {CONFIG}:\n  "
            + "\n  ".join(wrong)
            + "\nCopy both files of the adapter again."
        )
