"""How a tuned model is to be asked: the file that travels with an adapter.

`keras_gemma_ft.json` lies beside `adapter_config.json`, or in the folder of a
model that was tuned whole. It holds the settings that decide what the model
reads and over which base it computes, under the names of their flags. Where a
Jinja template was used, its source lies beside it. PEFT, transformers and vLLM
pass both files over.

    {"settings": {"data.template": "gemma", "model.quantize": "nf4", ...},
     "base": {"preset", "sha256", "dtype"}, "trained": {...}, "when": "...",
     "parents": [{"name", "sha256", "base", "when"}, ...]}
"""

import json
import pathlib
import re
import shlex
from typing import NamedTuple

from keras_gemma_ft import config
from keras_gemma_ft.formats import checkpoints
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.formats.peft_config import CONFIG as PEFT

FILE, JINJA = "keras_gemma_ft.json", "template.jinja"
# Settings that decide what a tuned model is asked, and over which base.
TRAVELS = (
    "preset",
    "data.template",
    "data.system",
    "data.format",
    "data.prompt_field",
    "data.response_field",
    "data.roles",
    "data.text_marks",
    "data.learn",
    "data.sequence_length",
    "model.quantize",
    "model.quantize_embedding",
    "model.dtype",
)
# Settings that name a run's records. They stay in its config.json: a path
# means nothing to whoever is given the adapter.
RECORDS = (
    "data.train",
    "data.eval",
    "data.ignore",
    "data.columns",
    "data.delimiter",
    "data.bad_rows",
    "seed",
)
# What is kept of each adapter that an adapter descends from.
_PARENT = ("name", "sha256", "base", "when")


class Usage(NamedTuple):
    """What travels: `told` is the file's content, `jinja` a source or ""."""

    told: dict
    jinja: str = ""


def describe(cfg, *, base, trained, when, parents=(), jinja=""):
    """What is to travel with what `cfg` trains: `Usage`.

    Args:
        cfg: `config.Config` of the run.
        base: {"preset", "sha256" of its weights, "dtype" they were read in}.
        trained: facts of the training, for people.
        when: an ISO 8601 time.
        parents: dicts of the adapters that it descends from, oldest first.
        jinja: the source of its Jinja template, if it has one.
    """
    every = config.flatten(cfg)
    settings = {path: every[path] for path in TRAVELS}
    if is_jinja(cfg.data.template):
        jinja = pathlib.Path(cfg.data.template).read_text("utf-8")
    if jinja:
        settings["data.template"] = JINJA
    if cfg.lora.init != "default":
        # Such an adapter is exported for the kernels as they were.
        settings["model.quantize"] = "none"
    told = {
        "settings": settings,
        "base": base,
        "trained": trained,
        "when": when,
        "parents": list(parents),
    }
    return Usage(told, jinja)


def write(folder, usage):
    """Writes the file, and the Jinja template if there is one."""
    text = json.dumps(usage.told, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", "utf-8")
    if usage.jinja:
        (folder / JINJA).write_text(usage.jinja, "utf-8")


def is_jinja(template):
    """Whether `--data.template` names a Jinja file."""
    return template.endswith((".jinja", ".jinja2", ".j2"))


def find(path):
    """What travels with the adapter (or whole model) at `path`.

    Args:
        path: a run folder, a checkpoint in it, a PEFT folder, a model's
            folder, or a `.lora.h5` file in a run folder.

    Returns:
        (the folder it was found in, `Usage`); (None, None) where there is
        none. Of a PEFT folder of other tools, its base is all that is known.

    Raises:
        UserError: the file is damaged, or holds values that no setting takes.
    """
    path = pathlib.Path(path)
    if checkpoints.is_checkpoint(path):
        return path, _of_run(path)
    folder = path.parent if path.is_file() else path
    places = folder, folder / "adapter"
    for place in places:
        if (place / FILE).is_file():
            return place, read(place)
    for place in places if path.is_dir() else ():
        if (place / PEFT).is_file():
            name = read_json(place / PEFT).get("base_model_name_or_path")
            if name and type(name) is str:
                return place, Usage({"settings": {"preset": _preset(name)}})
    return None, None


def _of_run(path):
    """`Usage` of a checkpoint: what its run's config.json says."""
    settings = checkpoints.settings_of(path)
    told = {name: settings[name] for name in TRAVELS if name in settings}
    config.check(config.replace(config.Config(), told))
    return Usage({"settings": told})


def _preset(name):
    """A PEFT file's name of its base as `--preset` takes it."""
    local = pathlib.Path(name).exists()
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not local
    return f"hf://{name}" if hub else name


def read(folder):
    """`Usage` of the files in `folder`, checked.

    Raises:
        UserError: see `find`.
    """
    file = folder / FILE
    told = read_json(file)
    try:
        given = told.get("settings")
        if type(given) is not dict:
            raise TypeError("it has no settings")
        # What a later version has added is passed over.
        settings = {path: given[path] for path in TRAVELS if path in given}
        config.check(config.replace(config.Config(), settings))
        parents = [
            {key: str(parent[key])[:200] for key in _PARENT if key in parent}
            for parent in told.get("parents", [])
        ]
        base = {
            key: value
            for key, value in told.get("base", {}).items()
            if type(value) is str
        }
    except (AttributeError, LookupError, TypeError, config.UserError) as error:
        raise config.UserError(
            f"{file} cannot be followed ({error}). Export the adapter again, "
            f"or remove the file and type its settings as flags."
        ) from None
    jinja, template = "", settings.get("data.template", "gemma")
    if is_jinja(template):
        # A name of ours and nothing else: no file elsewhere is ever opened.
        if template != JINJA or not (folder / JINJA).is_file():
            raise config.UserError(
                f"{file} names the template {template!r}, expected {JINJA} "
                f"beside it. Copy it there, or type --data.template=FILE."
            )
        jinja = (folder / JINJA).read_text("utf-8")
    whole = {**told, "settings": settings, "parents": parents, "base": base}
    return Usage(whole, jinja)


def settle(cfg, say, *, records=False):
    """`cfg` with what travels with its adapter, or with its preset's folder.

    What the user has typed wins over it; each such contradiction is said.

    Args:
        cfg: `config.Config`.
        say: function that shows a line to the user.
        records: whether a run folder's own records are wanted, too, where the
            user has named none.

    Raises:
        UserError: what travels is damaged, or cannot stand beside a flag.
    """
    folder, found = find(cfg.adapter or cfg.preset)
    if found is None:
        return cfg
    settings = dict(found.told["settings"])
    if settings.get("data.template") == JINJA:
        settings["data.template"] = str(folder / JINJA)
    if not cfg.adapter:
        # A model that was tuned whole is its own base.
        settings.pop("preset", None)
    typed = config.typed(cfg)
    if records and not typed & {"data.train", "data.eval"}:
        settings.update(_records(cfg.adapter))
    if settings.get("preset", cfg.preset) != cfg.preset:
        cfg = _without_recipe(cfg, typed)
    now = config.flatten(cfg)
    other = {p: v for p, v in settings.items() if v != now[p]}
    taken = {p: v for p, v in other.items() if p not in typed}
    if taken:
        say(f"as {folder} was taught: {_flags(taken)}")
    for path in sorted(other.keys() - taken.keys()):
        said, kept = _flags({path: now[path]}), _flags({path: other[path]})
        say(f"{said} was typed and is used; {folder} was taught with {kept}")
    cfg = config.replace(cfg, taken)
    config.check(cfg)
    return cfg


def _records(adapter):
    """The settings in a run folder that name its records; {} elsewhere."""
    path = pathlib.Path(adapter)
    file = (path.parent if path.is_file() else path) / "config.json"
    settings = read_json(file).get("settings") if file.is_file() else None
    if type(settings) is not dict:
        return {}
    return {path: settings[path] for path in RECORDS if path in settings}


def _without_recipe(cfg, typed):
    """`cfg` without the embedded model's recipe, if it was laid under it."""
    if "preset" in typed or cfg.preset != config.EMBEDDED_PRESET:
        return cfg
    values = config.flatten(cfg)
    fresh = config.Config(given=cfg.given)
    return config.replace(fresh, {path: values[path] for path in typed})


def _flags(settings):
    return " ".join(
        f"--{path}={shlex.quote(str(value))}"
        for path, value in settings.items()
    )


def doubt(cfg, *, sha256, dtype):
    """Why an adapter may not suit the base that was loaded; "" if it does.

    Args:
        cfg: `config.Config` with the adapter.
        sha256: of the base's weights, as they were read.
        dtype: in which they were read; what is read in another one has
            another sha256 and is not compared.
    """
    _, found = find(cfg.adapter) if cfg.adapter else (None, None)
    base = found.told.get("base", {}) if found else {}
    told = base.get("sha256")
    if not (told and sha256) or base.get("dtype") != dtype or told == sha256:
        return ""
    return (
        f"the base {cfg.preset} is not the one that --adapter={cfg.adapter} "
        f"was trained over ({base.get('preset')}): their weights differ "
        f"(sha256 {sha256[:12]} here, {told[:12]} there). Its "
        f"changes were made for the other one."
    )
