"""An export: each format written, opened again, described, and put in place."""

import json

from keras_gemma_ft import config, runtime
from keras_gemma_ft.checking import probes, verification, witnesses
from keras_gemma_ft.exporting import (
    card,
    push,
    sources,
    travelling,
    writers,
)
from keras_gemma_ft.formats import atomic, merging, usage
from keras_gemma_ft.formats.whole_change import WholeChange

# What lies in every export: what was compared, and the mark that it is ours.
RECORD = "export.json"


def run(cfg):
    """What `python -m keras_gemma_ft.export` does.

    Args:
        cfg: `config.Config`.

    Returns:
        The result: {"exports": [{"format", "path", "verification", ...}], ...}.

    Raises:
        UserError: see the message; nothing that did not verify is left.
    """
    formats = config.exporting.formats(cfg.export.format)
    push.check(cfg.export.push_to)
    source = sources.open(cfg)
    _refuse(formats, source)
    for what in formats:
        writers.check(what, source, cfg.export)
    folder = sources.target(cfg, source)
    places = {what: folder / what for what in formats}
    _check_replaceable(places.values())
    truth, case = None, None
    if cfg.export.verify:
        asked = probes.choose(source.cfg, source.tokenizer)
        case = witnesses.Case(source.base, asked.sequences, source.tokenizer)
        truth = verification.trained(
            source.cfg, source.base, source.adapter, asked
        )
        runtime.say(f"compared on {asked.origin}: {_losses(truth.told)}")
    result = {"name": source.name, "base": source.cfg.preset, "exports": []}
    result |= {"merged": source.made} if source.made else {}
    result |= truth.told if truth else {}
    for what, place in places.items():
        told = _one(what, place, source, cfg, case, truth)
        result["exports"].append({"format": what, "path": str(place), **told})
        runtime.say(f"{what}: {place}")
    if cfg.export.push_to:
        result["pushed"] = push.push(cfg.export.push_to, places)
    return result


def _one(what, place, source, cfg, case=None, truth=None):
    """Writes one format, whole and verified, or not at all."""
    wanted = writers.size(what, source, cfg.export)
    with atomic.replacing(place, wanted) as partial:
        kind = writers.WRITERS[what](source, partial, cfg.export)
        told = {"stored_as": kind}
        if truth:
            told["verification"] = verification.verify(
                what, partial, kind, case, truth
            )
        whole = told | (truth.told if truth else {})
        if source.usage:
            usage.write(partial, _travels(what, source, cfg))
        text = card.card(what, partial, source, whole)
        (partial / "README.md").write_text(text, "utf-8")
        text = json.dumps({"format": what, **whole}, indent=1)
        (partial / RECORD).write_text(text + "\n", "utf-8")
        told["bytes"] = sum(
            file.stat().st_size for file in partial.rglob("*") if file.is_file()
        )
    return told


def _travels(what, source, cfg):
    """What is told of how the model is to be asked."""
    told = source.usage
    if config.FORMATS[what]:
        told = travelling.of_whole(told)
    return travelling.public(told) if cfg.export.push_to else told


def _refuse(formats, source):
    """UserError if a format cannot hold what there is; nothing is written."""
    small = [what for what in formats if not config.FORMATS[what]]
    if isinstance(source.adapter, WholeChange):
        kinds = ", ".join(source.adapter.kinds)
        if said := merging.refusal(source.adapter):
            raise config.UserError(f"--adapter={source.cfg.adapter}: {said}")
        if small:
            raise config.UserError(
                f"--export.format={','.join(small)}: {source.cfg.adapter} "
                f"holds {kinds}, and can be merged only: "
                f"--export.format=merged_hf."
            )
    if source.adapter is None and small:
        whole = [what for what, base in config.FORMATS.items() if base]
        raise config.UserError(
            f"--export.format={','.join(small)}: {source.cfg.preset} is a "
            f"whole model, without an adapter. Whole models become "
            f"{', '.join(whole)}."
        )


def _check_replaceable(places):
    """UserError if a folder is there already that no export wrote."""
    for place in places:
        if place.exists() and not (place / RECORD).is_file():
            if place.is_dir() and not any(place.iterdir()):
                continue
            raise config.UserError(
                f"{place} is there already and holds no export of ours; it "
                f"would be replaced. Name another folder with --to=FOLDER."
            )


def _losses(told):
    named = {
        "loss": "loss",
        "loss_base": "without the adapter",
        "loss_quantised_base": "over the quantised base",
        "kl_to_base": "KL to the base",
    }
    return ", ".join(
        f"{words} {told[name]:.4g}"
        for name, words in named.items()
        if name in told
    )
