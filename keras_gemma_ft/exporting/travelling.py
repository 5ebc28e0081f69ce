"""What travels with an export: how the model is to be asked, for others."""

import pathlib


def of_whole(usage):
    """`usage` of an adapter, for a model into which the adapter is merged.

    Such a model is its own base, and was merged in full precision.
    """
    settings = dict(usage.told["settings"])
    settings.pop("preset", None)
    for path in ("model.quantize", "model.quantize_embedding"):
        if path in settings:
            settings[path] = "none"
    return usage._replace(told={**usage.told, "settings": settings})


def name(preset):
    """What a preset is called where its folder is not: its last part."""
    path = pathlib.Path(preset)
    return path.name if path.expanduser().exists() else preset


def public(usage):
    """`usage` without paths of this machine, for whoever it is given to."""
    told = {**usage.told, "settings": dict(usage.told["settings"])}
    for held in (told["settings"], told.setdefault("base", {})):
        if "preset" in held:
            held["preset"] = name(held["preset"])
    told["parents"] = [
        {**parent, "base": name(parent.get("base", ""))}
        for parent in told.get("parents", [])
    ]
    return usage._replace(told=told)
