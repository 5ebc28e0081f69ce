"""Who trains on the card: ours, stock KerasHub, PEFT, each in its process.

As `tests.benchmarks.contenders`, with models of `random_model`.
"""

import gc

from keras_gemma_ft import config, runtime
from tests.benchmarks import contenders, model
from tests.benchmarks.gpu import random_model


def settings(spec):
    """`config.Config` of a spec."""
    return config.replace(
        contenders.settings(spec),
        {
            "model.quantize": spec.get("quantize", "none"),
            "model.compile": spec.get("compile", "auto"),
        },
    )


def ours(spec, channel):
    """`FineTuner`, built and fitted as a run does it."""
    cfg = settings(spec)
    runtime.start(cfg)
    if spec.get("traced"):
        random_model.trace()
    sizes = model.Sizes(**spec["sizes"])
    tuner = random_model.tuner(cfg, sizes, steps=spec["total"])
    contenders.fit_ours(spec, channel, tuner)


def stock(spec, channel):
    """KerasHub's `GemmaCausalLM.fit`; it never recomputes."""
    runtime.start(settings(spec))
    sizes = model.Sizes(**spec["sizes"])
    made = random_model.causal_lm(sizes, spec["dtype"])
    contenders.fit_stock(spec, channel, contenders.with_lora(spec, made))


def peft(spec, channel):
    """transformers + PEFT; with Liger's kernels or 4 bits where asked."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_gemma2

        apply_liger_kernel_to_gemma2()
    in_4_bits = spec.get("in_4_bits", False)
    base = random_model.transformers_model(
        model.Sizes(**spec["sizes"]), spec["dtype"], device, in_4_bits
    )
    tuned = contenders.with_peft(spec, base)
    gc.collect()
    contenders.fit_peft(spec, channel, tuned, device, autocast=in_4_bits)
