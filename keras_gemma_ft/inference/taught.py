"""A base model and its adapter, set up the way the adapter was taught."""

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import adapters, usage
from keras_gemma_ft.model import base_template, lora, presets


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
    loaded = presets.open(cfg)
    cfg = base_template.settle(cfg, loaded.tokenizer)
    backbone = loaded.causal_lm.backbone
    if cfg.adapter and adapter:
        lora.load(backbone, cfg.adapter)
    elif cfg.adapter:
        adapters.read(cfg.adapter, backbone.get_config())
    say_doubt(cfg, loaded)
    return cfg, loaded


def say_doubt(cfg, loaded):
    """Says so if the adapter was trained over other weights than these."""
    dtype = loaded.causal_lm.backbone.dtype_policy.name
    said = usage.doubt(cfg, sha256=loaded.fingerprint, dtype=dtype)
    if said:
        runtime.say(f"warning: {said}")
