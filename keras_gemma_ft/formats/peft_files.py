"""The files of an adapter's folder: its settings, and its tensors by plain names.

PEFT's folder and mlx-lm's; what wrappers of PyTorch add to names is taken off.
"""

import json
import re
from typing import NamedTuple

import safetensors

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import mlx_adapter
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.formats.peft_config import CONFIG, read_config
from keras_gemma_ft.formats.peft_write import HEADER, WEIGHTS
from keras_gemma_ft.formats.shards import FLOATS

# What wrappers put before and between the parts of a name: torch.compile,
# FSDP, checkpointing, DistributedDataParallel.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\.|^module\."
)
# The name of an adapter, which older writers leave in.
_ADAPTER = re.compile(
    r"(?<=\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector"
    r"|modules_to_save|trainable_tokens_delta)\.(?!weight$|bias$)(\w+)"
)


class Files(NamedTuple):
    """What a folder holds.

    Attributes:
        config: its settings, as PEFT has them.
        tensors: {name as PEFT's, without `base_model.model.`: float32 array}.
        wrong: complaints about the names.
        own: what `write_peft` noted of its own, or None.
    """

    config: dict
    tensors: dict
    wrong: list
    own: dict | None


def read(folder):
    """The `Files` of an adapter's folder.

    Raises:
        UserError: there are none, they are damaged, or ask for what is not
            supported.
    """
    told = read_json(folder / CONFIG)
    if mlx_adapter.is_mlx(told) and (folder / mlx_adapter.WEIGHTS).is_file():
        tensors, _ = _read_weights(folder / mlx_adapter.WEIGHTS)
        tensors, config = mlx_adapter.as_peft(folder, tensors, told)
        return Files(config, *_named(tensors), None)
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    config = read_config(folder)
    tensors, own = _read_weights(folder / WEIGHTS)
    return Files(config, *_named(tensors), own)


def _named(tensors):
    """(tensors under names as PEFT's, without what wrappers add; complaints)."""
    found, wrong = {}, []
    for name, value in tensors.items():
        short = _WRAPPERS.sub("", name)
        short = short.removeprefix("base_model.model.")
        short = _ADAPTER.sub(r"\1", _WRAPPERS.sub("", short))
        if not short.startswith(("model.", "lm_head.")):
            # A Gemma2Model without its head was tuned.
            short = f"model.{short}"
        if short in found:
            wrong.append(f"{name}: there twice, under two names")
        found[short] = value
    return found, wrong


def _no_weights(folder):
    if (folder / "adapter_model.bin").is_file():
        return UserError(
            f"{folder} has only adapter_model.bin, a pickle, which can run "
            "code when opened. Convert it: peft.PeftModel.from_pretrained("
            "base, folder).save_pretrained(new, safe_serialization=True)"
        )
    return UserError(f"{folder} has no {WEIGHTS}. Export the adapter again.")


def _read_weights(path):
    """All tensors as float32, and what `write_peft` noted of its own."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            own = json.loads((file.metadata() or {}).get(HEADER, "null"))
            kinds = {n: file.get_slice(n).get_dtype() for n in file.keys()}
            wrong = [f"{n}: {k}" for n, k in kinds.items() if k not in FLOATS]
            tensors = {n: file.get_tensor(n) for n in kinds if not wrong}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}). "
            "Fetch or export the adapter again."
        ) from error
    if wrong:
        raise UserError(
            f"{path} holds tensors that are not {', '.join(FLOATS)}:\n  "
            + "\n  ".join(wrong)
            + "\nExport the adapter again without quantizing it."
        )
    return {n: t.astype("float32") for n, t in tensors.items()}, own
