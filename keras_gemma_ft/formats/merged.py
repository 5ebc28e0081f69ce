"""Writes a whole Gemma 2 as a folder in Hugging Face's format.

Streamed: one variable is in memory at a time, whatever a shard holds.
"""

import json

from keras_gemma_ft.formats import models, names, tensors
from keras_gemma_ft.formats.huggingface import huggingface_config
from keras_gemma_ft.formats.names import HEAD

INDEX = "model.safetensors.index.json"


def write_huggingface(folder, model, *, dtype, shards, stops=(1, 107)):
    """`config.json`, `generation_config.json` and safetensors shards.

    Args:
        folder: exists; the tokenizer's files are written beside.
        model: a reader; see `formats/models.py`.
        dtype: name of the dtype that the weights are stored in.
        shards: lists of paths, one for each file, as `models.split` makes.
        stops: ids at which generation ends.
    """
    count, weight_map, total = len(shards), {}, 0
    for number, paths in enumerate(shards, 1):
        name = "model.safetensors"
        if count > 1:
            name = f"model-{number:05}-of-{count:05}.safetensors"
        writer = tensors.Writer(folder / name)
        try:
            for path in paths:
                array = models.cast(model.read(path), dtype)
                key, array = names.to_huggingface(path, array)
                writer.put(key, array)
                weight_map[key], total = name, total + array.nbytes
            writer.finish({"format": "pt"})
        finally:
            writer.close()
    if count > 1:
        told = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(folder / INDEX, told)
    config = huggingface_config(model.backbone, dtype=dtype)
    config["tie_word_embeddings"] = HEAD not in model.paths
    _write(folder / "config.json", config | {"eos_token_id": list(stops)})
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": list(stops),
        "pad_token_id": config["pad_token_id"],
        "cache_implementation": "hybrid",
    }
    _write(folder / "generation_config.json", generation)


def _write(path, told):
    path.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
