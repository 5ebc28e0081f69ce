"""What is to be exported: a base, an adapter, and what travels with them."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from keras_gemma_ft import config, runtime
from keras_gemma_ft.exporting import travelling
from keras_gemma_ft.formats import (
    adapters,
    checkpoints,
    combine,
    models,
    names,
    usage,
)
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.inference import switching, taught
from keras_gemma_ft.model import base_template, preset_source, presets


class Source(NamedTuple):
    """A tuned model, none of whose weights but the adapter's are read yet.

    Attributes:
        cfg: `config.Config` with what travels with the adapter.
        base: reader of the base; see `formats/models.py`.
        adapter: `low_rank.Adapter`; None of a model that was tuned whole.
        tokenizer: `data.tokens.Tokenizer`.
        usage: `usage.Usage`, or None where nothing travels.
        folder: the base's folder.
        name: what it is called.
        facts: {"summary": ..., "config": ...} of the run, where there is one.
        made: what several adapters, or a lower rank, made of it; for the
            result.
    """

    cfg: config.Config
    base: Any
    adapter: Any
    tokenizer: Any
    usage: Any
    folder: pathlib.Path
    name: str
    facts: dict
    made: dict


def find(cfg):
    """`cfg` whose `adapter` or `preset` is what is to be exported.

    Raises:
        UserError: the run folder holds nothing to export yet.
    """
    typed = config.typed(cfg)
    if cfg.adapter or ("preset" in typed and "run_dir" not in typed):
        return cfg
    run = pathlib.Path(cfg.run_dir).expanduser()
    if (run / "model").is_dir():
        return dataclasses.replace(cfg, preset=str(run / "model"))
    if (run / "adapter").is_dir() or checkpoints.is_checkpoint(run):
        return dataclasses.replace(cfg, adapter=str(run))
    if not run.is_dir():
        raise config.UserError(
            f"--run_dir={cfg.run_dir}: there is no such run. Name one, or an "
            f"adapter: --adapter=FOLDER."
        )
    newest = checkpoints.newest(run)
    if newest is None:
        raise config.UserError(
            f"--run_dir={cfg.run_dir} holds neither an adapter nor a whole "
            f"checkpoint yet. Train on, or name an adapter: --adapter=FOLDER."
        )
    runtime.say(f"the run has not ended: its newest checkpoint is {newest}")
    return dataclasses.replace(cfg, adapter=str(newest))


def open(cfg):
    """The `Source` that `cfg` names; see `find`.

    Raises:
        UserError: the base or the adapter is not what it should be.
    """
    cfg = find(cfg)
    parts = switching.paths(cfg.adapter)
    weights = _weights(cfg, parts)
    # How several that are merged are to be asked, the first of them says.
    first = dataclasses.replace(cfg, adapter=parts[0] if parts else "")
    cfg = usage.settle(first, runtime.say, records=True)
    origin = cfg.adapter or cfg.preset
    folder = preset_source.folder(cfg.preset)
    base = read(cfg.preset, folder)
    adapter, made = None, {}
    if parts:
        read_one = functools.partial(
            adapters.read, backbone=base.backbone, base=cfg.preset
        )
        held = [read_one(path) for path in parts]
        for one in held:
            taught.say_doubts(one)
        adapter, made = _combined(cfg, held, weights)
        if made:
            runtime.say(_sentence(made, parts))
    rows = models.Merged(base, adapter).backbone["vocabulary_size"]
    words = taught.tokenizer(cfg, presets.tokenizer(folder), rows)
    cfg = base_template.settle(cfg, words)
    _, travels = usage.find(origin)
    if cfg.export.push_to and isinstance(adapter, adapters.Adapter):
        # It is for others now: no path of this machine.
        base_name = travelling.name(adapter.base)
        adapter = dataclasses.replace(adapter, base=base_name)
    return Source(
        cfg,
        base,
        adapter,
        words,
        travels if travels and "base" in travels.told else None,
        folder,
        _name(origin),
        _facts(origin),
        made,
    )


def _weights(cfg, parts):
    """The weight of each adapter in their sum; none of a single one.

    Raises:
        UserError: there are not as many weights as adapters.
    """
    weights = config.exporting.weights(cfg.export.weights)
    if len(parts) > 1 and not weights:
        raise config.UserError(
            f"--adapter names {len(parts)} adapters, and an export is of one. "
            f"Merge them by a weighted sum: --weights="
            f"{','.join([str(round(1 / len(parts), 3))] * len(parts))}, or "
            f"export each by itself."
        )
    if weights and len(weights) != len(parts):
        raise config.UserError(
            f"--export.weights={cfg.export.weights} are {len(weights)} numbers "
            f"for {len(parts)} adapters; expected one for each."
        )
    return weights


def _combined(cfg, held, weights):
    """The adapters' weighted sum, cut to `--export.rank`, and its facts."""
    adapter, *more = held
    made = {}
    if weights:
        parts = list(zip([adapter, *more], weights))
        adapter = combine.weighted_sum(parts)
        made = {"weights": list(weights), "rank": adapter.rank}
    if cfg.export.rank:
        before = adapter.rank
        adapter, lost = combine.truncated(adapter, cfg.export.rank)
        made |= {"rank_before": before, "rank": adapter.rank}
        made |= {"lost": lost.whole, "lost_in_worst_layer": lost.worst}
    return adapter, made


def _sentence(made, parts):
    """What was made of the adapters, in words."""
    told = []
    if "weights" in made:
        whole = made.get("rank_before", made["rank"])
        told.append(f"{len(parts)} adapters added up, exactly: rank {whole}")
    if "lost" in made:
        told.append(
            f"cut from rank {made['rank_before']} to {made['rank']}: "
            f"{made['lost']:.2%} of the change is lost (Frobenius norm), "
            f"{made['lost_in_worst_layer']:.2%} in the worst layer"
        )
    return "; ".join(told)


def read(preset, folder):
    """A reader of the model in `folder`.

    Presets that early versions of KerasHub wrote name their groups otherwise:
    those are loaded whole, by KerasHub.
    """
    try:
        return models.open(folder)
    except config.UserError:
        if preset_source.is_huggingface(folder):
            raise
    return InMemory(presets.load(preset, dtype="bfloat16").causal_lm.backbone)


class InMemory:
    """A loaded backbone as a reader; see `formats/models.py`.

    Args:
        backbone: a Keras `GemmaBackbone` without LoRA.
    """

    def __init__(self, backbone):
        self.backbone = backbone.get_config()
        self.variables = {
            v.path.removeprefix(f"{backbone.name}/"): v
            for v in backbone.variables
        }
        order = names.variable_shapes(self.backbone)
        self.paths = [path for path in order if path in self.variables]

    def read(self, path):
        """One variable as a numpy array."""
        from keras import ops

        return ops.convert_to_numpy(self.variables[path].value)


def _run(origin):
    """The run folder that an adapter or a model lies in, or None."""
    path = pathlib.Path(origin).expanduser().absolute()
    if checkpoints.is_checkpoint(path):
        return checkpoints.run_of(path)
    for folder in (path, path.parent):
        config_file = folder / "config.json"
        if config_file.is_file() and "settings" in read_json(config_file):
            return folder
    return None


def _name(origin):
    """What an export of `origin` is called: its run's, or its folder's name."""
    run = _run(origin)
    name = (run or pathlib.Path(origin)).name
    return name.removesuffix(".lora.h5").removesuffix(".gguf") or "model"


def _facts(origin):
    """{"summary", "config"} of the run of `origin`; {} where there is none."""
    run = _run(origin)
    if run is None:
        return {}
    files = {"config": run / "config.json", "summary": run / "summary.json"}
    return {k: read_json(v) for k, v in files.items() if v.is_file()}


def target(cfg, source):
    """The folder that gets a folder for each format."""
    if cfg.export.to:
        return pathlib.Path(cfg.export.to).expanduser()
    run = _run(source.cfg.adapter or source.cfg.preset)
    return run / "export" if run else pathlib.Path("exports") / source.name
