"""A preset's name -> a `GemmaCausalLM` and its tokenizer, ready to be tuned.

A name is the embedded model, a KerasHub preset, a handle (`kaggle://`,
`hf://`), or a local folder in Keras preset or Hugging Face format.
"""

import collections
import dataclasses
import json
import math
import pathlib

import keras
import keras_hub
import numpy as np

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import tokens
from keras_gemma_ft.formats import (
    huggingface,
    models,
    names,
    shards,
    tokenizer_folder,
)
from keras_gemma_ft.formats.names import HEAD, TABLE
from keras_gemma_ft.model import (
    base_template,
    biases,
    cache,
    preset_source,
    sharding,
    tables,
    weights,
)

Loaded = collections.namedtuple("Loaded", "causal_lm tokenizer fingerprint")


def open(cfg, *, full=False, change=None):
    """Loads `cfg.preset` in the dtype and on the mesh that suit the device.

    Args:
        cfg: `config.Config`.
        full: whether the weights themselves are trained: they stay float32.
        change: as of `load`.

    Returns:
        `Loaded`.
    """
    dtype, why = runtime.choose_dtype(cfg.model.dtype)
    runtime.say(f"dtype: {dtype} ({why})")
    if full and dtype != "float32":
        dtype = f"mixed_{dtype}"
    sharding.start(cfg, lambda: _bytes(cfg.preset, dtype))
    model = cfg.model
    if cfg.lora.init != "default":
        # Adapters that start from the kernels must see them first.
        model = dataclasses.replace(model, quantize="none")
    loaded = load(cfg.preset, dtype=dtype, model=model, change=change)
    backbone = loaded.causal_lm.backbone
    if full and tables.has_head(backbone):
        raise config.UserError(
            f"--preset={cfg.preset} has a head of its own, for which what "
            f"--lora.rank=0 writes has no place. Use --lora.rank=8."
        )
    runtime.say(
        f"model: {cfg.preset}, {parameters(backbone):,} parameters, "
        f"{backbone.num_layers} layers, {len(backbone.variables)} variables "
        f"loaded once each, sha256 {loaded.fingerprint[:12]}"
    )
    runtime.say(f"weights: {sharding.describe(backbone.variables)}")
    return loaded


def parameters(backbone):
    """Numbers in a backbone's weights, however they are stored."""
    shapes = names.variable_shapes(backbone.get_config())
    if tables.has_head(backbone):
        shapes[HEAD] = shapes[TABLE]
    return sum(map(math.prod, shapes.values()))


def _bytes(preset, dtype):
    """What the weights take, told without them; None if it cannot be."""
    width = np.dtype(keras.DTypePolicy(dtype).variable_dtype).itemsize
    source = preset_source.resolve(preset)
    if not isinstance(source, pathlib.Path):
        known = keras_hub.models.GemmaBackbone.presets.get(source)
        return known and width * known["metadata"]["params"]
    settings = huggingface.read_json(source / "config.json")
    if preset_source.is_huggingface(source):
        settings = {"config": huggingface.backbone_config(settings)}
    try:
        shapes = names.variable_shapes(settings["config"])
    except (KeyError, TypeError):
        return None  # KerasHub will say what is wrong with it.
    return width * sum(map(math.prod, shapes.values()))


def load(preset, *, dtype="float32", model=config.Model(), change=None):
    """Loads a Gemma 2 and its tokenizer.

    Args:
        preset: see the module's docstring.
        dtype: Keras dtype policy of the weights and the computation.
        model: how weights are stored, and where they are kept so.
        change: `formats.whole_change.WholeChange` that is merged into the
            weights as they are read.

    Returns:
        `Loaded(causal_lm, tokenizer, fingerprint)`: a `GemmaCausalLM` without
        preprocessor, a `data.tokens.Tokenizer`, and a sha256 of the weights.

    Raises:
        config.UserError: unknown name, no access, no network, not a Gemma 2,
            or a variable that was not loaded exactly once.
    """
    if keras.config.floatx() != "float32":
        # bfloat16 labels above 256 are rounded: a wrong loss, in silence.
        raise config.UserError(
            f"keras.config.floatx() is {keras.config.floatx()!r}; set it to "
            f"'float32' (~/.keras/keras.json) and use --model.dtype instead."
        )
    source = preset_source.resolve(preset)
    if change is not None:
        source = preset_source.folder(preset)
        modes = model.quantize, model.quantize_embedding
        backbone, fingerprint = weights.once(
            source, lambda: _read_changed(source, dtype, change), *modes
        )
        biases.add(backbone, change.biases)
    else:
        backbone, fingerprint = _backbone(source, dtype, model)
    backbone.preset = preset
    if preset_source.is_huggingface(source):
        settings = huggingface.read_json(source / "config.json")
        for line in huggingface.doubts(settings):
            runtime.say(f"warning: {line}")
    words = tokenizer(source)
    if words.vocabulary_size > backbone.vocabulary_size:
        raise config.UserError(
            f"--preset={preset}: the tokenizer has "
            f"{words.vocabulary_size} words, the model only "
            f"{backbone.vocabulary_size}: they do not belong together."
        )
    causal_lm = keras_hub.models.GemmaCausalLM(
        backbone=backbone, preprocessor=None
    )
    return Loaded(causal_lm, words, fingerprint)


def _backbone(source, dtype, model):
    """(backbone, fingerprint), from the cache where it is there."""
    modes = model.quantize, model.quantize_embedding
    folder = source if isinstance(source, pathlib.Path) else None
    kept = cache.place(model, folder, dtype)
    if kept is not None and kept.exists():
        try:
            found = cache.Kept(kept)
            backbone, _ = weights.once(
                source, lambda: _fill(_empty(source, dtype), found), *modes
            )
        except cache.Damaged as error:
            cache.discard(kept, error)
        else:
            runtime.say(f"quantised weights: from the cache, {kept}")
            return backbone, found.fingerprint
    keeper = cache.Keeper(kept, folder)
    read = _from_keras_hub
    if preset_source.is_huggingface(source):
        read = _read_huggingface
    try:
        backbone, fingerprint = weights.once(
            source, lambda: read(source, dtype), *modes, keeper.note
        )
        keeper.finish(fingerprint, cache.place(model, folder, dtype))
    finally:
        keeper.drop()
    return backbone, fingerprint


def _empty(source, dtype):
    """The backbone of a folder, no weight of which is read."""
    if preset_source.is_huggingface(source):
        return _huggingface_backbone(source, dtype)
    return _from_keras_hub(source, dtype, load_weights=False)


def _fill(backbone, kept):
    """Gives a backbone its variables, as `cache.Kept` has them."""
    for v in progress(backbone.variables, len(backbone.variables), "loading"):
        v.assign(kept.value(v.path))
    return backbone


def _from_keras_hub(source, dtype, load_weights=True):
    """A backbone through KerasHub's own loader, errors with their cure."""
    if isinstance(source, pathlib.Path):
        # KerasHub's error about a broken one does not name the file.
        huggingface.read_json(source / "config.json")
    try:
        # KerasHub reads a registered class name from config.json: refuse
        # others than Gemma before anything of the folder is built.
        backbone = keras_hub.models.GemmaBackbone.from_preset(
            str(source), dtype=dtype, load_weights=load_weights
        )
    except Exception as error:
        cure = preset_source.cure(source, error)
        if cure is None:
            raise
        raise config.UserError(f"--preset={source}: {cure}") from None
    if backbone.attention_logit_soft_cap is None:
        raise config.UserError(
            f"--preset={source} is a Gemma without Gemma 2's soft caps. This "
            f"package tunes Gemma 2: --preset=gemma2_2b_en, for example."
        )
    return backbone


def _read_huggingface(folder, dtype):
    """A backbone filled from safetensors, one tensor in memory at a time."""
    backbone = _huggingface_backbone(folder, dtype)
    return _filled(backbone, shards.read_tensors(folder))


def _huggingface_backbone(folder, dtype):
    sizes, found = shards.find(folder)
    return _build(sizes, dtype, names.huggingface_name(HEAD) in found)


def _read_changed(folder, dtype, change):
    """A backbone of a folder's weights with a change in them."""
    model = models.Merged(models.open(folder), change)
    backbone = _build(model.backbone, dtype, HEAD in model.paths)
    return _filled(backbone, ((p, model.read(p)) for p in model.paths))


def _build(sizes, dtype, headed):
    """A backbone of these sizes; `headed`: with a head of its own."""
    settings = dict(sizes)
    scalar = settings.pop("query_pre_attn_scalar")
    backbone = keras_hub.models.GemmaBackbone(**settings, dtype=dtype)
    backbone.query_pre_attn_scalar = scalar
    if headed:
        tables.add_head(backbone)
        runtime.say("lm_head.weight is a head of its own: used, not trained")
    return backbone


def _filled(backbone, stream):
    """Gives a backbone its variables, as a stream of (Keras path, array)."""
    variables = {
        v.path.removeprefix(f"{backbone.name}/"): v for v in backbone.variables
    }
    if tables.has_head(backbone):
        variables[HEAD] = backbone.token_embedding.head
    for path, array in progress(stream, len(backbone.variables), "loading"):
        variables[path].assign(array)
    return backbone


def progress(iterable, total, what):
    """A progress bar on stderr."""
    from tqdm import auto

    return auto.tqdm(iterable, what, total, leave=False, mininterval=0.5)


def tokenizer(source):
    """The `tokens.Tokenizer` of what `preset_source.resolve` gave."""
    if not isinstance(source, pathlib.Path):
        gemma = keras_hub.models.GemmaTokenizer.from_preset(source)
        return tokens.Tokenizer(gemma.proto)
    found = tokenizer_folder.read(source, template=base_template.text(source))
    for line in found.said:
        runtime.say(f"warning: {line}")
    return tokens.Tokenizer(found.proto, stops=found.stops, named=found.named)


def save(folder, backbone, tokenizer):
    """Writes a Keras preset folder that `load` and KerasHub read.

    Args:
        folder: where to; must not exist yet.
        backbone: without LoRA; written in its own dtype.
        tokenizer: `data.tokens.Tokenizer`.
    """
    backbone.save_to_preset(str(folder))
    gemma = keras_hub.models.GemmaTokenizer(tokenizer.proto)
    gemma.save_to_preset(str(folder))
    config_file = pathlib.Path(folder) / "config.json"
    settings = json.loads(config_file.read_text())
    settings["config"]["name"] = "gemma_backbone"
    if tokenizer.foreign:
        tokenizer_folder.keep(
            pathlib.Path(folder), stops=tokenizer.stops, named=tokenizer.named
        )
    config_file.write_text(json.dumps(settings, indent=1))
