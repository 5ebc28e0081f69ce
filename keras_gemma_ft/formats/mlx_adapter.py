"""An adapter as mlx-lm writes it -> tensors and settings as PEFT has them.

`adapters.safetensors` holds `model.layers.N.self_attn.q_proj.lora_a` [in, r]
and `lora_b` [r, out], DoRA's magnitudes as `m`; `adapter_config.json` has
`lora_parameters: {rank, scale, ...}`, where the scale is used as it is
(mlx_lm/tuner/lora.py).
"""

from keras_gemma_ft.config import UserError

WEIGHTS = "adapters.safetensors"
_NAMES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}


def is_mlx(config):
    """Whether an `adapter_config.json` is mlx-lm's."""
    return "peft_type" not in config and (
        "lora_parameters" in config or "fine_tune_type" in config
    )


def as_peft(folder, tensors, config):
    """(tensors, config) as PEFT would have written them.

    Raises:
        UserError: its settings cannot be followed.
    """
    told = config.get("lora_parameters") or {}
    scale = told.get("scale")
    if type(scale) not in (int, float):
        raise UserError(
            f"{folder / 'adapter_config.json'}: lora_parameters.scale is "
            f"{scale!r}, expected a number, as mlx-lm writes it."
        )
    found = {}
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        # Their matrices lie the other way round.
        value = value.T if last in ("lora_a", "lora_b") else value
        found[f"{module}.{_NAMES.get(last, last)}"] = value
    ranks = [len(v) for n, v in found.items() if n.endswith("lora_A.weight")]
    rank = max(ranks, default=1)
    return found, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        # Scale times its own rank: alpha / r is the scale of every module.
        "mlx_scale": scale,
        "lora_dropout": told.get("dropout", 0.0),
        "base_model_name_or_path": str(config.get("model") or ""),
    }
