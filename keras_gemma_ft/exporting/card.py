"""README.md of an export: what it is, what it can do, how it was proven.

Hubs show it. Nothing in it is a path of the machine that wrote it, and what
users have named is escaped.
"""

import pathlib
import re

from keras_gemma_ft import config
from keras_gemma_ft.formats import low_rank, model_card
from keras_gemma_ft.formats.huggingface import read_json

_LIBRARIES = {
    "peft": "peft", "keras": "keras-hub", "merged_hf": "transformers",
    "merged_keras": "keras-hub", "gguf": "gguf", "gguf_adapter": "gguf",
    "ollama": "gguf",
}  # fmt: skip
_OWN_LICENCE = """
## Licence

The base is no model of Google's: `keras_gemma_ft` made it and carries it, under
the Apache License 2.0.
"""
_LICENCE = """
## Licence

Gemma is provided under and subject to the Gemma Terms of Use found at
ai.google.dev/gemma/terms. They hold for this derivative too: pass them on, and
keep the restrictions of the Gemma Prohibited Use Policy.
"""
# How each format is loaded; {base} is the base's name on the hub.
_LOAD = {
    "peft": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this folder")
```

vLLM: `vllm serve {base} --enable-lora --lora-modules mine=FOLDER`; {vllm}.
SGLang: `python -m sglang.launch_server --model-path {base} --lora-paths
mine=FOLDER`.""",
    "keras": """\
```python
import keras_hub

model = keras_hub.models.GemmaCausalLM.from_preset("{preset}")
model.backbone.enable_lora({rank}, target_layer_names={targets})
model.backbone.load_lora_weights("adapter.lora.h5")
```""",
    "gguf_adapter": """\
`llama-cli -m BASE.gguf --lora adapter.gguf`, where BASE.gguf is {base} as a
GGUF. `llama-server` takes the same two flags.""",
    "merged_hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

vLLM: `vllm serve FOLDER`. SGLang: `python -m sglang.launch_server --model-path
FOLDER`.""",
    "merged_keras": """\
```python
import keras_hub

model = keras_hub.models.GemmaCausalLM.from_preset("this folder")
```""",
    "gguf": """\
`llama-cli -m {model}`, or `llama-server -m {model}` for an endpoint as OpenAI's.
The chat template and the end tokens are in the file.""",
    "ollama": """\
`ollama create mine -f Modelfile`, then `ollama run mine`.""",
}


def card(what, folder, source, told):
    """The text.

    Args:
        what: the format.
        folder: where it is being written.
        source: `sources.Source`.
        told: "stored_as", "verification", and what `verification.record`
            tells.
    """
    address = base_address(source)
    own = source.cfg.preset == config.EMBEDDED_PRESET
    licence = "apache-2.0" if own else "gemma"
    front = [f"library_name: {_LIBRARIES[what]}", f"license: {licence}"]
    if re.fullmatch(r"[\w\-]+/[\w.\-]+", address):
        front.insert(0, f"base_model: {address}")
    front.append("tags:\n- gemma2" + ("\n- lora" if source.adapter else ""))
    parts = [
        "---\n" + "\n".join(front) + "\n---\n",
        f"# {_plain(source.name)}\n\n{_facts(what, source, told, address)}",
        f"\n## Load it\n\n{_load(what, folder, source, address)}\n",
        model_card.asked(source.usage) if source.usage else "",
        _training(source),
        _verified(told),
        _OWN_LICENCE if own else _LICENCE,
    ]
    return "".join(parts)


def base_address(source):
    """The base's name on the Hugging Face hub, or words that name it."""
    name = source.cfg.preset
    if name == config.EMBEDDED_PRESET:
        return "the model that keras_gemma_ft carries (gemma2_tiny_en)"
    known = model_card.base_model_id(name)
    if not pathlib.Path(known).exists():
        return known
    file = source.folder / "config.json"
    told = read_json(file).get("_name_or_path", "") if file.is_file() else ""
    if re.fullmatch(r"[\w\-]+/[\w.\-]+", str(told)):
        return str(told)
    return "a local model"


def _facts(what, source, told, address):
    rows = [("base", _code(address))]
    if not pathlib.Path(source.cfg.preset).exists():
        rows.append(("`--preset`", _code(source.cfg.preset)))
    rows += [("format", f"{what}, weights in {told['stored_as']}")]
    adapter = source.adapter
    if isinstance(adapter, low_rank.Adapter):
        factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
        scale = f"rank {adapter.rank}, scale {factor:g}, style {adapter.style}"
        rows += [("adapter", scale)]
        rows += [("adapted layers", ", ".join(adapter.targets))]
    if "lost" in source.made:
        rows += [("lost by cutting its rank", f"{source.made['lost']:.2%}")]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _load(what, folder, source, address):
    fields = {
        "base": address if "/" in address else "BASE",
        "preset": _stock_name(source.cfg.preset),
        "model": next((p.name for p in folder.glob("*.gguf")), ""),
        "rank": 0,
        "targets": [],
        "vllm": "",
    }
    if isinstance(source.adapter, low_rank.Adapter):
        fields["rank"] = low_rank.stock_rank(source.adapter)
        fields["targets"] = list(source.adapter.targets)
    if what == "peft":
        rank = read_json(folder / "adapter_config.json")["r"]
        fields["vllm"] = model_card.vllm_note(rank)
    return _LOAD[what].format_map(fields)


def _stock_name(preset):
    """What stock KerasHub calls the base, or BASE where it does not know it."""
    here = pathlib.Path(preset).exists() or preset == config.EMBEDDED_PRESET
    return "BASE" if here else preset


def _training(source):
    """What the run says of itself: data, recipe, before and after."""
    summary = source.facts.get("summary", {})
    told = source.facts.get("config", {})
    lines = []
    for split, files in (told.get("data") or {}).items():
        for file in files:
            name = pathlib.PurePath(str(file.get("name", "?"))).name
            lines.append(
                f"- {split}: {_code(name)}, {file.get('rows', '?')} records, "
                f"sha256 {_code(str(file.get('sha256', '?')))}"
            )
    settings = told.get("settings") or {}
    recipe = [
        f"{path} = {settings[path]}" for path in _RECIPE if path in settings
    ]
    if recipe:
        lines.append(f"- recipe: {_code(', '.join(recipe))}")
    for name, words in _METRICS.items():
        if name in summary and summary.get(f"{name}_before") is not None:
            lines.append(
                f"- {words}: {summary[f'{name}_before']:.4g} before, "
                f"{summary[name]:.4g} after"
            )
    if "steps" in summary:
        lines.append(
            f"- {summary['steps']} steps, {summary.get('tokens', 0):,} learned "
            f"tokens, on {_code(str(summary.get('device', '?')))}"
        )
    return "\n## Training\n\n" + "\n".join(lines) + "\n" if lines else ""


_METRICS = {
    "eval_loss": "held-out loss",
    "exact_match": "held-out answers that match exactly",
}
_RECIPE = (
    "train.learning_rate", "train.schedule", "train.warmup", "train.optimizer",
    "data.batch_size", "data.sequence_length", "lora.dropout", "lora.init",
    "model.quantize", "seed",
)  # fmt: skip


def _verified(told):
    found = told.get("verification")
    if not found:
        return (
            "\n## Not verified\n\nThis export was written with `--noverify`.\n"
        )
    lines = [
        f"- opened again by: {found['witness']}",
        f"- compared with: {found['against']}, on {_plain(told['probes'])}, "
        f"{found['positions']} tokens",
        f"- largest difference of a logit: {found['max_difference']:.3g}",
        f"- mean KL divergence: {found['kl']:.3g} nats"
        + (
            f" (the base without the adapter: {told['kl_to_base']:.3g})"
            if "kl_to_base" in told
            else ""
        ),
        f"- top-1 agreement: {found['top1']:.1%}",
    ]
    names = {
        "loss": "loss of their answers",
        "loss_base": "the same without the adapter",
        "loss_quantised_base": "the same over the quantised base, as trained",
    }
    lines += [f"- {w}: {told[n]:.4g}" for n, w in names.items() if n in told]
    return "\n## Verified\n\n" + "\n".join(lines) + "\n"


def _code(text):
    """A user's text as code in Markdown, which it cannot end."""
    text = re.sub(r"[`|\s]+", " ", text).strip()[:300]
    return f"`{text}`"


def _plain(text):
    """A user's text whose marks mean nothing in Markdown or HTML."""
    text = re.sub(r"\s+", " ", text).strip()[:300]
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", text)
