"""README.md of an exported adapter: what it is, who can load it and how."""

import json
import re

from keras_gemma_ft.formats import low_rank

# Values of --max-lora-rank that vLLM accepts (vllm/config/lora.py).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# KerasHub preset -> the same weights on the Hugging Face hub.
_HUB = {
    f"gemma2_{kind}{size}_en": f"google/gemma-2-{size}{suffix}"
    for size in ("2b", "9b", "27b")
    for kind, suffix in (("", ""), ("instruct_", "-it"))
}

_TEXT = """\
# LoRA adapter for Gemma 2

| base | {base} |
|---|---|
| trained as | rank {rank}, alpha {alpha:g}{rslora}, style {style} |
| dropout | {dropout:g} |
| adapted layers | {modules} |
| rank in this folder | {peft_rank} |

Trained with KerasHub's Gemma through `keras_gemma_ft`.

## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base_code})
model = PeftModel.from_pretrained(base, "this folder")
```

vLLM: {vllm}.
{patterns}{notes}"""

_PATTERNS = """
Layers differ in rank (`rank_pattern`); a reader must take each layer's alpha
from `alpha_pattern`, or scale all of them by `lora_alpha / r`: both give the
same numbers.
"""


def base_model_id(base):
    """Name of the base model as Hugging Face tools know it."""
    name = base.removeprefix("hf://")
    return _HUB.get(name, name)


def vllm_note(rank):
    """Which `--max-lora-rank` serves an adapter of this rank, in words."""
    for limit in VLLM_RANKS:
        if rank <= limit:
            return f"serve with `--enable-lora --max-lora-rank {limit}`"
    return (
        f"rank {rank} is above its limit of {VLLM_RANKS[-1]}; "
        "merge the adapter into the model to serve it"
    )


def model_card(adapter, config, notes=""):
    """Text of the README.md.

    Args:
        adapter: `low_rank.Adapter`.
        config: dict of its `adapter_config.json`.
        notes: Markdown for the end.
    """
    base = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags:\n- lora\n- gemma2"]
    # The hub refuses a card whose base_model is no repository name.
    if re.fullmatch(r"[\w\-]+/[\w.\-]+", base):
        front.insert(0, f"base_model: {base}")
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    rslora = f", rsLoRA (scale {factor:g})" if adapter.rslora else ""
    text = _TEXT.format(
        base=adapter.base or "not recorded",
        rank=adapter.rank,
        alpha=adapter.alpha,
        rslora=rslora,
        style=adapter.style,
        dropout=adapter.dropout,
        modules=", ".join(adapter.targets),
        peft_rank=config["r"],
        base_code=json.dumps(base or "the base model"),
        vllm=vllm_note(config["r"]),
        patterns=_PATTERNS if config["rank_pattern"] else "",
        notes=f"\n{notes.strip()}\n" if notes.strip() else "",
    )
    return "---\n" + "\n".join(front) + "\n---\n" + text
