"""Several adapters on one base, which take turns without loading it again.

LoRA is turned on once, in a form that holds them all: every target of any of
them, the highest rank, and style "standard" unless all are "keras". What an
adapter lacks is zero, so that the numbers are its own. A turn assigns the
variables, which compiled programs take as arguments: nothing is compiled anew.
"""

import dataclasses
import os
import pathlib
import statistics
import time
from typing import NamedTuple

import keras

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import examples
from keras_gemma_ft.formats import adapters, combine, low_rank, usage
from keras_gemma_ft.inference import taught
from keras_gemma_ft.model import base_template, lora, presets

# What decides over which weights an adapter computes.
_BASE = ("preset", "model.quantize", "model.quantize_embedding", "model.dtype")


class Adapters:
    """Adapters that take turns in the LoRA variables of one backbone.

    Args:
        backbone: a `GemmaBackbone` without LoRA; it gets it.
        held: {name: `low_rank.Adapter`}; without any, the base answers.
        base: the name of the backbone without an adapter.
    """

    def __init__(self, backbone, held, *, base=""):
        self.backbone, self.base, self.now = backbone, base, base
        self.names, self.seconds = list(held), []
        self._held = {base: {}}
        if not held:
            return
        self._form = _form(held.values())
        factor = low_rank.scale(self._form.rank, self._form.alpha)
        lora.enable(backbone, lora.settings_of(self._form))
        for name, adapter in held.items():
            self._held[name] = combine.padded(
                adapter,
                style=self._form.style,
                rank=self._form.rank,
                factor=factor,
            )
        self._write(base)

    def use(self, name, say=None):
        """Answers come from this adapter from now on; `base` is none.

        Args:
            name: of an adapter, or the base's.
            say: function that shows a line, if one is wanted.
        """
        took = ""
        if name != self.now:
            began = time.monotonic()
            self._write(name)
            self.seconds.append(time.monotonic() - began)
            took = f", switched to in {1000 * self.seconds[-1]:.1f} ms"
        if say:
            say(f"adapter: {name}{took}")

    def milliseconds(self):
        """What a switch took, the median of all; None without any."""
        if not self.seconds:
            return None
        return round(1000 * statistics.median(self.seconds), 3)

    def _write(self, name):
        weights = self._held[name]
        lora.write(
            self.backbone, dataclasses.replace(self._form, weights=weights)
        )
        self.now = name
        if keras.config.backend() == "jax":
            import jax

            pairs = lora.variables(self.backbone).values()
            # Else the copies would be counted as part of what follows.
            jax.block_until_ready([v.value for pair in pairs for v in pair])


class Loaded(NamedTuple):
    """A base with the adapters that take turns on it.

    Attributes:
        ways: {name: `config.Config`}: how each adapter is to be asked, in the
            order in which they were named; the base's name comes last, and is
            asked as the first of them.
        model: `presets.Loaded`.
        adapters: `Adapters`, the base in use.
    """

    ways: dict
    model: object
    adapters: Adapters


def several(adapter):
    """Whether `--adapter` names more than one adapter."""
    return len(paths(adapter)) > 1


def paths(adapter):
    """The paths that `--adapter` names: one, or `a,b` where none has it all."""
    if not adapter or pathlib.Path(adapter).exists():
        return [adapter] if adapter else []
    return list(dict.fromkeys(filter(None, map(str.strip, adapter.split(",")))))


def named(found, base=""):
    """{name: path}: a run's folder or an adapter's, each name once.

    Args:
        found: paths.
        base: a name that is taken.
    """
    names = {base: None}
    for path in found:
        place = pathlib.Path(os.path.abspath(path))
        if place.name in ("adapter", "adapter.lora.h5"):
            place = place.parent
        name = wanted = place.name.removesuffix(".lora.h5")
        number = 2
        while name in names:
            name, number = f"{wanted}-{number}", number + 1
        names[name] = path
    del names[base]
    return names


def base_name(preset):
    """What the base is called: a preset's name, or that of its folder."""
    return preset if "://" in preset else pathlib.Path(preset).name


def load(cfg, *, records=False):
    """The base of `cfg`'s adapters, however many, and those on it.

    Args:
        cfg: `config.Config`; what travels with an adapter is used where the
            user has typed nothing else.
        records: whether the records of the adapters' runs are wanted too.

    Returns:
        `Loaded`.

    Raises:
        config.UserError: an adapter or the base is not what it should be, or
            the adapters have different bases; each of them is named.
    """
    found = paths(cfg.adapter)
    _there(found)
    settled = [
        usage.settle(
            config.replace(cfg, {"adapter": path}),
            runtime.say,
            records=records,
        )
        for path in found or [""]
    ]
    if found:
        settled = _on_one_base(cfg, settled)
    if records and len(found) > 1:
        settled = _of_one_set(cfg, settled)
    first = settled[0]
    base = base_name(first.preset)
    names = named(found, base)
    model = presets.open(first)
    settled = [base_template.settle(own, model.tokenizer) for own in settled]
    backbone = model.causal_lm.backbone
    sizes = backbone.get_config()
    held = {name: adapters.read(path, sizes) for name, path in names.items()}
    combine.check_plain(held.values())
    for own, adapter in zip(settled, held.values()):
        taught.say_doubts(adapter)
        taught.say_doubt(own, model)
    ways = {**dict(zip(names, settled)), base: settled[0]}
    return Loaded(ways, model, Adapters(backbone, held, base=base))


def _form(held):
    """An adapter without weights in a form that holds all of `held`."""
    held = list(held)
    style = combine.common_style(held)
    rank = max(combine.rank_in(adapter, style) for adapter in held)
    scales = {low_rank.scale(a.rank, a.alpha, a.rslora) for a in held}
    # In 16 bits s and B are rounded apart: a common s stays what it is.
    factor = scales.pop() if len(scales) == 1 else 1.0
    targets = [target for adapter in held for target in adapter.targets]
    return low_rank.Adapter(
        style=style,
        rank=rank,
        alpha=factor * rank,
        rslora=False,
        dropout=0.0,
        targets=low_rank.ordered(targets),
        weights={},
    )


def _there(found):
    """Refuses paths without an adapter, all of them, before a base is read."""
    wrong = []
    for path in found:
        try:
            adapters.place(path)
        except config.UserError as error:
            wrong.append(str(error))
    if wrong:
        raise config.UserError("\n".join(wrong))


def _on_one_base(cfg, settled):
    """`settled`, if all have one base; what tells none takes the others'."""
    told = [_base_of(own) for own in settled]
    known = next((i for i, base in enumerate(told) if base), 0)
    base = {path: config.flatten(settled[known])[path] for path in _BASE}
    settled = [
        own if here else config.replace(own, base)
        for own, here in zip(settled, told)
    ]
    lines = [_flags(own) for own in settled]
    if len(set(lines)) == 1 and "preset" not in config.typed(cfg):
        # One name, but weights that were not the same.
        kinds = {(b["dtype"], b["sha256"]) for b in told if "sha256" in b}
        if len({dtype for dtype, _ in kinds}) < len(kinds):
            lines = [
                f"{line} (weights {here.get('sha256', 'unknown'):.12})"
                for line, here in zip(lines, told)
            ]
    if len(set(lines)) == 1:
        return settled
    each = [f"{own.adapter}: {line}" for own, line in zip(settled, lines)]
    raise config.UserError(
        f"--adapter={cfg.adapter}: they are for different bases:\n  "
        + "\n  ".join(each)
        + "\nName those of one base, or type the base that all are to be "
        "put on, such as --preset="
        + settled[0].preset
        + f" --model.quantize={settled[0].model.quantize}."
    )


def _base_of(own):
    """What an adapter tells of its base: preset, sha256, dtype; or {}."""
    _, found = usage.find(own.adapter)
    if found is None or "preset" not in found.told["settings"]:
        return {}
    base = found.told.get("base", {})
    whole = {"sha256", "dtype"} <= base.keys()
    return base if whole else {"preset": found.told["settings"]["preset"]}


def _flags(own):
    """The flags that name a base, those that say something."""
    values, default = config.flatten(own), config.flatten(config.Config())
    return " ".join(
        f"--{path}={values[path]}"
        for path in _BASE
        if path == "preset" or values[path] != default[path]
    )


def _of_one_set(cfg, settled):
    """`settled`, all with the records of the one run that names some."""
    plain = config.flatten(cfg)
    sets = {}
    for own in settled:
        values = config.flatten(own)
        mine = {path: values[path] for path in usage.RECORDS}
        if examples.share(own.data) is None:
            # The seed decides which records a share holds out, no others.
            mine["seed"] = plain["seed"]
        if mine != {path: plain[path] for path in usage.RECORDS}:
            sets[own.adapter] = mine
    if len({tuple(mine.items()) for mine in sets.values()}) > 1:
        each = [
            f"{path}: --data.train={mine['data.train']} "
            f"--data.eval={mine['data.eval']} --seed={mine['seed']}"
            for path, mine in sets.items()
        ]
        raise config.UserError(
            f"--adapter={cfg.adapter}: their runs held out different "
            "records:\n  "
            + "\n  ".join(each)
            + "\nName what all are to be scored on: --data.eval=FILE."
        )
    mine = next(iter(sets.values()), {})
    return [config.replace(own, mine) for own in settled]
