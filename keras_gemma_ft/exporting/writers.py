"""Writes one format into a folder, and names who opens it again.

A writer is a function of (`sources.Source`, folder, `config.Export`) that
writes into the folder and returns how the weights are stored: a dtype, or a
kind of GGUF.
"""

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import chat_template
from keras_gemma_ft.exporting import modelfile, travelling
from keras_gemma_ft.formats import (
    adapters,
    gguf_adapter,
    gguf_model,
    keras_preset,
    merged,
    models,
    names,
    tokenizer_files,
)


def peft(source, folder, settings):
    """The folder that PEFT and vLLM load."""
    kind = "float32" if settings.dtype == "auto" else settings.dtype
    adapters.write_peft(folder, source.adapter, usage=source.usage, dtype=kind)
    # For vLLM's --chat-template, and for people.
    template = folder / "chat_template.jinja"
    template.write_text(_template(source), "utf-8")
    return kind


def keras(source, folder, settings):
    """`adapter.lora.h5` for stock KerasHub."""
    folder.mkdir()
    index = adapters.layer_index(source.base.backbone["num_layers"])
    adapters.write_keras(folder / "adapter.lora.h5", source.adapter, index)
    return "float32"


def merged_hf(source, folder, settings):
    """A model in Hugging Face's format: transformers, vLLM, SGLang."""
    folder.mkdir()
    model, dtype, shards = _merged(source, settings)
    tokenizer = source.tokenizer
    merged.write_huggingface(
        folder,
        model,
        dtype=dtype,
        shards=shards,
        stops=sorted(tokenizer.stops),
    )
    tokenizer_files.write_tokenizer(
        folder,
        tokenizer.proto,
        chat_template=_template(source),
        named=tokenizer.named,
    )
    return dtype


def merged_keras(source, folder, settings):
    """A preset folder for stock KerasHub."""
    model, dtype, shards = _merged(source, settings)
    keras_preset.write_preset(
        folder,
        model,
        source.tokenizer.proto,
        dtype=dtype,
        shards=shards,
        versions=runtime.versions(),
    )
    return dtype


def _template(source):
    """The chat template that asks as the model was taught."""
    data = source.cfg.data
    return chat_template.of(data.template, system=data.system)


def check(what, source, settings):
    """UserError if a format cannot hold the model; nothing is computed."""
    model = models.Merged(source.base, source.adapter)
    if what in ("gguf", "ollama"):
        gguf_model.check(model, settings.quantize)
    if what == "merged_keras" and names.HEAD in model.paths:
        raise config.UserError(
            "merged_keras: this model has a head of its own (lm_head), and "
            "KerasHub's Gemma has none beside the token table. Export it as "
            "merged_hf."
        )


def size(what, source, settings):
    """About how many bytes a format takes; 0 where that is little."""
    if not config.FORMATS[what]:
        return 0
    kind = _dtype(source, settings)
    if what in ("gguf", "ollama"):
        kind = settings.quantize
    return models.parameters(source.base) * (4 if kind.endswith("32") else 2)


def _dtype(source, settings):
    """Name of the dtype of merged weights."""
    if settings.dtype == "auto":
        return models.dtype_of(source.base)
    return settings.dtype


def _merged(source, settings):
    """(reader of the merged model, name of its dtype, its shards)."""
    model = models.Merged(source.base, source.adapter)
    dtype = _dtype(source, settings)
    limit = config.exporting.size(settings.max_shard_size)
    return model, dtype, models.split(model, dtype, limit)


def adapter_gguf(source, folder, settings):
    """`adapter.gguf` for llama.cpp."""
    folder.mkdir()
    gguf_adapter.write_gguf_adapter(
        folder / "adapter.gguf",
        source.adapter,
        name=source.name,
        base=travelling.name(source.cfg.preset),
    )
    return "float32"


def gguf(source, folder, settings):
    """`model-KIND.gguf`: base and adapter as one file for llama.cpp."""
    folder.mkdir()
    kind = settings.quantize
    gguf_model.write_gguf_model(
        folder / f"model-{kind.upper()}.gguf",
        models.Merged(source.base, source.adapter),
        source.tokenizer.control_proto,
        kind=kind,
        template=_template(source),
        name=source.name,
    )
    return kind


def ollama(source, folder, settings):
    """A merged GGUF and the `Modelfile` that Ollama makes a model of."""
    kind = gguf(source, folder, settings)
    text = modelfile.modelfile(source, f"model-{kind.upper()}.gguf")
    (folder / "Modelfile").write_text(text, "utf-8")
    return kind


WRITERS = {
    "peft": peft,
    "keras": keras,
    "gguf_adapter": adapter_gguf,
    "merged_hf": merged_hf,
    "merged_keras": merged_keras,
    "gguf": gguf,
    "ollama": ollama,
}
