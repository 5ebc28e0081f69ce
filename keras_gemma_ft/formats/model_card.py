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
{asked}{patterns}{started}{notes}"""

_ASKED = """
## Ask it as it was taught

`python -m keras_gemma_ft.generate --adapter=FOLDER` does all of this by
itself: it reads `keras_gemma_ft.json`, which lies in this folder.

{points}
"""

_PATTERNS = """
Layers differ in rank (`rank_pattern`); a reader must take each layer's alpha
from `alpha_pattern`, or scale all of them by `lora_alpha / r`: both give the
same numbers.
"""


# What A B stood for at the start, by `Adapter.init`.
_STARTS = {
    "pissa": (
        "PiSSA (arXiv 2404.02948): A0 B0 held the principal directions of "
        "each kernel W,\nand W - s A0 B0 was frozen, in the run's own storage"
    ),
    "loftq": (
        "LoftQ (arXiv 2310.08659): each kernel W was quantised to Q and "
        "frozen,\nand A0 B0 was the best fit of its error, W - Q ~ s A0 B0"
    ),
}
_STARTED = """
## On the original base

Training started from {start}.
This folder holds what training changed, s (A B - A0 B0): the pairs
[A, A - A0] x [B - B0; B0], of twice the rank, {doubled}. Load it, as above, on
the original base weights in 16 or 32 bits, never on a residual or on Q with
A0 B0 added. If the run did not quantise its base, that is the trained model up
to rounding. If it did, it is the trained model without the error of
quantising that A0 B0 had left, and its loss differs by as much from the run's.
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


def asked(usage):
    """Markdown that says how a tuned model is to be asked.

    Args:
        usage: `usage.Usage`, as `usage.describe` makes it.
    """
    told = usage.told
    settings, trained = told["settings"], told["trained"]
    points = [_template(settings["data.template"], usage.jinja)]
    if settings["data.system"]:
        text = _quoted(settings["data.system"])
        points.append(f"This system text stands before the question:\n{text}")
    layout = trained["layout"]
    if layout:
        fields = ", ".join(f"{k} = `{v}`" for k, v in layout["fields"].items())
        points.append(
            f"Its records were of the format `{layout['format']}` ({fields})."
        )
    length = settings["data.sequence_length"]
    points.append(f"It was trained on rows of {length} tokens.")
    points.append(_base(told["base"], trained))
    for parent in told["parents"]:
        points.append(
            f"Its training went on from the adapter `{parent['name']}` "
            f"({parent.get('when', 'time not known')}), trained over "
            f"`{parent['base'] or 'a base that is not recorded'}`, whose "
            f"weights have the sha256 `{parent['sha256']}`."
        )
    lines = "\n".join(f"- {point}" for point in points)
    return _ASKED.format(points=lines)


def _template(template, jinja):
    if jinja:
        return (
            "Prompts are written by the chat template `template.jinja`, which "
            "lies in this folder."
        )
    if template == "gemma":
        return (
            "Prompts are written in Gemma's turns, as the chat template of "
            "`google/gemma-2-2b-it` writes them."
        )
    return (
        "Prompts are written in this form, which is not Gemma's turns. The "
        "question takes the place of the first name in braces; the model "
        f"writes what the last one stands for:\n{_quoted(template)}"
    )


def _quoted(text):
    """A text as an indented block of code, which it cannot end."""
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    return (
        "\n" + "\n".join(f"      {line}" for line in text.splitlines()) + "\n"
    )


def _base(base, trained):
    """What it was trained over, and how that was stored."""
    kinds = {
        "kernels": trained["quantize"],
        "token table": trained["quantize_embedding"],
    }
    stored = [f"the {part} in {kind}" for part, kind in kinds.items()
              if kind != "none"]  # fmt: skip
    return (
        f"It was trained over `{base['preset']}`, computed in "
        f"{base['dtype']}, with "
        + (" and ".join(stored) or "weights that were not quantised")
        + "."
    )


def model_card(adapter, config, notes="", usage=None):
    """Text of the README.md.

    Args:
        adapter: `low_rank.Adapter`.
        config: dict of its `adapter_config.json`.
        notes: Markdown for the end.
        usage: `usage.Usage`: how the model is to be asked, if it is known.
    """
    base = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags:\n- lora\n- gemma2"]
    # The hub refuses a card whose base_model is no repository name.
    if re.fullmatch(r"[\w\-]+/[\w.\-]+", base):
        front.insert(0, f"base_model: {base}")
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    start = _STARTS.get(adapter.init)
    # A `low_rank.difference` has twice the rank and alpha of the training.
    fold = 2 if start else 1
    rslora = f", rsLoRA (scale {factor:g})" if adapter.rslora else ""
    text = _TEXT.format(
        base=adapter.base or "not recorded",
        rank=adapter.rank // fold,
        alpha=adapter.alpha / fold,
        rslora=rslora,
        style=adapter.style,
        dropout=adapter.dropout,
        modules=", ".join(adapter.targets),
        peft_rank=config["r"],
        base_code=json.dumps(base or "the base model"),
        vllm=vllm_note(config["r"]),
        asked=asked(usage) if usage else "",
        patterns=_PATTERNS if config["rank_pattern"] else "",
        started=_STARTED.format(start=start, doubled=adapter.rank)
        if start
        else "",
        notes=f"\n{notes.strip()}\n" if notes.strip() else "",
    )
    return "---\n" + "\n".join(front) + "\n---\n" + text
