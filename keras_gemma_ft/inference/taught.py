"""A base model and its adapter, set up the way the adapter was taught."""

import gc

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import adapters, usage
from keras_gemma_ft.model import (
    base_template,
    lora,
    preset_source,
    presets,
)


def load(cfg, *, adapter=True, records=False):
    """The model that `cfg` asks for.

    Args:
        cfg: `config.Config`. What travels with its adapter is used where the
            user has typed nothing else.
        adapter: whether the adapter is put on the base, or only checked.
        records: whether the records of the adapter's run are wanted too.

    Returns:
        (the `config.Config` with what travels and the template of the
        base, `presets.Loaded`).

    Raises:
        config.UserError: the base or the adapter is not what it should be.
    """
    cfg = usage.settle(cfg, runtime.say, records=records)
    # Before the weights: a wrong path should not cost minutes.
    found = read(cfg)
    loaded = _open(cfg, found if adapter else None)
    backbone = loaded.causal_lm.backbone
    words = tokenizer(cfg, loaded.tokenizer, backbone.vocabulary_size)
    loaded = loaded._replace(tokenizer=words)
    cfg = base_template.settle(cfg, words)
    say_doubt(cfg, loaded)
    return cfg, loaded


def adapted(cfg, held):
    """The model with `cfg.adapter` in it, whose base was loaded before.

    Args:
        cfg: as `load` has given it.
        held: list of the base's `presets.Loaded`, which is taken out: an
            adapter that can be merged only has the weights loaded anew, and
            the old ones should not be there at the same time.

    Returns:
        `presets.Loaded`.
    """
    loaded, found = held.pop(), read(cfg)
    if not isinstance(found, adapters.WholeChange):
        lora.put(loaded.causal_lm.backbone, found)
        return loaded
    words = loaded.tokenizer
    del loaded
    gc.collect()
    return _open(cfg, found)._replace(tokenizer=words)


def tokenizer(cfg, base, rows):
    """The base's tokenizer, or that of an adapter that brought new tokens.

    Args:
        cfg: `config.Config` with the adapter.
        base: `data.tokens.Tokenizer` of the base.
        rows: of the token table.
    """
    folder = adapters.place(cfg.adapter) if cfg.adapter else None
    files = "tokenizer.json", "tokenizer.model"
    if folder is None or not any((folder / file).is_file() for file in files):
        return base
    own = presets.tokenizer(folder)
    if not base.vocabulary_size < own.vocabulary_size <= rows:
        return base
    more = own.vocabulary_size - base.vocabulary_size
    runtime.say(f"the tokenizer of {folder} is used: it has {more} more pieces")
    return own


def read(cfg):
    """The adapter that `cfg` names, of either kind; None: it names none.

    Raises:
        config.UserError: it is damaged, or not for this base.
    """
    if not cfg.adapter:
        return None
    found = adapters.read(cfg.adapter, preset_source.sizes(cfg.preset))
    say_doubts(found)
    return found


def _open(cfg, found):
    """The base of `cfg` with an adapter on it, or merged into it, or none."""
    if isinstance(found, adapters.WholeChange):
        runtime.say(
            f"{cfg.adapter} holds {', '.join(found.kinds)}: it is merged into "
            f"the base as that is read"
        )
        return presets.open(cfg, change=found)
    loaded = presets.open(cfg)
    if found:
        lora.put(loaded.causal_lm.backbone, found)
    return loaded


def say_doubts(adapter):
    """Says what is doubtful about an adapter's files."""
    for doubt in adapter.doubts:
        runtime.say(f"warning: {doubt}")


def say_doubt(cfg, loaded):
    """Says so if the adapter was trained over other weights than these."""
    dtype = loaded.causal_lm.backbone.dtype_policy.name
    said = usage.doubt(cfg, sha256=loaded.fingerprint, dtype=dtype)
    if said:
        runtime.say(f"warning: {said}")
