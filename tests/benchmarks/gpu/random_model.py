"""Gemma 2 of random weights, made where it is to be measured, from no file.

Layers of a kind share their numbers, which no clock sees: 2B or 9B are there
in seconds, and a quantised kernel never exists as a float.
"""

import functools
import warnings

import numpy as np

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import huggingface
from tests.benchmarks import quantize

_LOUD = ("query/kernel", "key/kernel", "embeddings")


def causal_lm(sizes, dtype, mode="none", gain=1.0):
    """A KerasHub `GemmaCausalLM`, by the way on which files are loaded.

    Args:
        sizes: `model.Sizes`.
        dtype: Keras policy.
        mode: as --model.quantize.
        gain: of queries, keys and the table: with 4 the soft caps bite.
    """
    import keras_hub

    from keras_gemma_ft.model import codes, weights

    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**24 if sizes.layers > 8 else 2**18, "float32")

    @functools.cache
    def value(kind, shape):
        array = quantize.values(rng, pool, kind, shape, shape)
        if gain != 1 and kind.endswith(_LOUD):
            array = (array.astype("float32") * gain).astype(array.dtype)
        if kind.endswith("/kernel") and mode != "none":
            return codes.encode(array, mode)
        if dtype != "bfloat16":
            array = array.astype("float32")
        # Or one array would be the parameter of every layer on a CPU.
        array.flags.writeable = False
        return array

    def make():
        backbone = keras_hub.models.GemmaBackbone(
            **sizes.backbone(), dtype=dtype
        )
        with warnings.catch_warnings():
            # What Torch copies may be read-only.
            warnings.filterwarnings("ignore", message=".*not writable")
            for variable in backbone.variables:
                # The same kind in every layer: "attention/query/kernel".
                kind = "/".join(variable.path.split("/")[-3:])
                variable.assign(value(kind, tuple(variable.shape)))
        return backbone

    backbone, _ = weights.once("random", make, mode)
    backbone.preset = "random"
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def tuner(cfg, sizes, *, steps, gain=1.0):
    """A compiled `FineTuner` of a random model, as a run builds it.

    Args:
        cfg: `config.Config`; its preset is not read.
        sizes: `model.Sizes`.
        steps: optimizer steps.
        gain: as of `causal_lm`.
    """
    from keras_gemma_ft.model import presets
    from keras_gemma_ft.tuning import trainer

    dtype, _ = runtime.choose_dtype(cfg.model.dtype)
    made = causal_lm(sizes, dtype, cfg.model.quantize, gain)
    loaded = presets.Loaded(made, None, "")
    return trainer.build(cfg, loaded, steps=steps, warmup=0)


def trace():
    """Blocks and head run op by op what the compiler would be given.

    For the tiny models of a CPU, whose C++ takes a minute to compile.
    """
    from torch._dynamo.backends import debugging

    from keras_gemma_ft.model import compiled
    from keras_gemma_ft.tuning import chunks

    compiled.inductor = debugging.aot_eager_decomp_partition
    chunks._compiled = lambda: chunks.losses_and_dz


def transformers_model(sizes, dtype, device, in_4_bits=False):
    """A `Gemma2ForCausalLM` on `device`; its linear layers in 4 bits if asked.

    Args:
        sizes: `model.Sizes`.
        dtype: name of the dtype.
        device: `torch.device`.
        in_4_bits: NF4 with double quantisation by bitsandbytes.
    """
    import torch
    import transformers

    kind = getattr(torch, dtype)
    settings = huggingface.huggingface_config(sizes.backbone(), dtype=dtype)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config.from_dict(settings),
            dtype=kind,
            attn_implementation="eager",
        )
    if not in_4_bits:
        return made
    import peft

    for _name, parent in list(made.named_modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and child != "lm_head":
                setattr(parent, child, _in_4_bits(layer, kind, device))
    made.is_loaded_in_4bit = True
    made.config.use_cache = False
    return peft.prepare_model_for_kbit_training(
        made, gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def _in_4_bits(layer, kind, device):
    """A `Linear4bit`, as `BitsAndBytesConfig` for QLoRA makes it."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, device="meta",
        compute_dtype=kind, compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True,
        quant_type="nf4", module=made,
    )  # fmt: skip
    return made.to(device)
