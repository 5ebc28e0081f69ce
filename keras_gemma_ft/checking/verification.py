"""Opens an export again and compares what it computes with what was trained."""

import gc
import importlib.metadata
from typing import Any, NamedTuple

from keras_gemma_ft import config, runtime
from keras_gemma_ft.checking import compare, probes, witnesses, words
from keras_gemma_ft.formats import adapters, models
from keras_gemma_ft.formats.huggingface import query_scalar
from keras_gemma_ft.formats.names import HEAD
from keras_gemma_ft.model import lora, presets


class Trained(NamedTuple):
    """What the trained model computes.

    Attributes:
        by: what computed it, in words.
        tuned: logits of the probes, with the adapter; see `witnesses`.
        told: {"probes", "loss", "loss_base", ...}: what was asked, and the
            losses of the answers in nats.
    """

    by: str
    tuned: list
    told: dict


def trained(cfg, base, adapter, asked):
    """`Trained` of a base and an adapter, over the base in full precision.

    Args:
        cfg: `config.Config`; its preset is the base.
        base: the base's reader.
        adapter: `low_rank.Adapter`, or None.
        asked: `probes.Probes`.

    Raises:
        UserError: the adapter changes nothing.
    """
    low_rank = adapter is None or isinstance(adapter, adapters.Adapter)
    if low_rank and witnesses.fits(base):
        by = "the model that is trained, through Keras in float32"
        plain, tuned = _through_keras(cfg, config.Model(), adapter, asked)
    else:
        by = "our NumPy reference, a block at a time"
        tuned = witnesses.by_reference(
            models.Merged(base, adapter), asked.sequences
        )
        plain = adapter and witnesses.by_reference(base, asked.sequences)
    told = {"probes": asked.origin, "loss": probes.loss(tuned, asked)}
    if adapter is not None:
        effect = compare.differences(tuned, plain)
        if effect["max_difference"] == 0:
            raise config.UserError(
                "the adapter changes nothing: with it and without it the "
                "model computes the same. --noverify exports it all the same."
            )
        told["loss_base"] = probes.loss(plain, asked)
        told["kl_to_base"] = effect["kl"]
    stored = cfg.model.quantize, cfg.model.quantize_embedding
    if adapter is not None and low_rank and stored != ("none", "none"):
        if witnesses.fits(base):
            model = config.Model(
                quantize=stored[0], quantize_embedding=stored[1]
            )
            _, quantised = _through_keras(cfg, model, adapter, asked)
            told["loss_quantised_base"] = probes.loss(quantised, asked)
    told = {name: value for name, value in told.items() if value is not None}
    return Trained(by, tuned, told)


def _through_keras(cfg, model, adapter, asked):
    """(logits of the base or None, logits with the adapter)."""
    loaded = presets.load(cfg.preset, dtype="float32", model=model)
    plain = witnesses.by_keras(loaded.causal_lm, asked.sequences)
    if adapter is None:
        return None, plain
    lora.enable(loaded.causal_lm.backbone, lora.settings_of(adapter))
    lora.write(loaded.causal_lm.backbone, adapter)
    tuned = witnesses.by_keras(loaded.causal_lm, asked.sequences)
    del loaded
    gc.collect()
    return plain, tuned


def verify(what, folder, kind, case, truth):
    """Opens one export again.

    Args:
        what: the format's name.
        folder: where it was written.
        kind: how its weights are stored; see `compare.LIMITS`.
        case: `witnesses.Case`.
        truth: `Trained`.

    Returns:
        dict: "witness", "against", and what `compare.differences` tells.

    Raises:
        UserError: it computes something else, or cannot be opened.
    """
    witness, name = _witness(what, case)
    try:
        found = compare.differences(truth.tuned, witness(folder, case))
    finally:
        gc.collect()
    compare.check(what, found, kind)
    words.check(what, folder, case.tokenizer)
    runtime.say(
        f"{what}: opened again by {name}: largest difference of a logit "
        f"{found['max_difference']:.2g}, KL {found['kl']:.2g} nats, top-1 "
        f"agreement {found['top1']:.1%}"
    )
    return {"witness": name, "against": truth.by, **found}


class _Witness(NamedTuple):
    """Who can open a format: a function, its packages, and when it may."""

    function: Any
    packages: tuple
    can: Any


def _whole(case):
    return witnesses.fits(case.base)


def _stock(case):
    # KerasHub scales 27B's queries by its head_dim, whatever its config says.
    sizes = case.base.backbone
    if HEAD in case.base.paths:
        return False  # Nor has it a head that is not the token table.
    return query_scalar(sizes) == sizes["head_dim"] and witnesses.fits(
        case.base, copies=2.3
    )


_TORCH = ("transformers", "torch")
_WITNESSES = {
    "peft": _Witness(witnesses.peft_folder, ("peft", *_TORCH), _whole),
    "keras": _Witness(witnesses.stock_keras, ("keras-hub",), _stock),
    "merged_hf": _Witness(witnesses.transformers_folder, _TORCH, _whole),
    "merged_keras": _Witness(witnesses.keras_preset, ("keras-hub",), _stock),
    "gguf_adapter": _Witness(
        witnesses.llama_adapter, ("llama-cpp-python",), _whole
    ),
    "gguf": _Witness(witnesses.llama_model, ("llama-cpp-python",), _whole),
}
_WITNESSES["ollama"] = _WITNESSES["gguf"]


def _witness(what, case):
    """(function, name) of the best witness of a format that is here."""
    best = _WITNESSES[what]
    versions = {package: _version(package) for package in best.packages}
    if None not in versions.values() and best.can(case):
        # Torch only computes for them.
        told = [f"{p} {v}" for p, v in versions.items() if p != "torch"]
        return best.function, " over ".join(told)
    read = witnesses.READERS[what]

    def reader(folder, case):
        return witnesses.by_reference(read(folder, case), case.sequences)

    return reader, "our own reader of the written bytes, in NumPy"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
