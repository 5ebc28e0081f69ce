"""What config.json says of a run, and how two runs differ by it."""

import hashlib

from keras_gemma_ft import config, runtime

# Settings that may differ when a run goes on: they change no number.
_FREE = {
    "run_dir",
    "resume",
    "backend",
    # Its content counts, not where it lies.
    "adapter",
    "mesh",
    "model.remat",
    "model.scan",
    "model.quantize_cache",
    "device",
    "compile",
    "search",
    "hosts.count",
    "hosts.index",
    "hosts.coordinator",
    "hosts.local",
    "data.cache",
    "train.time_budget",
    "train.keep_checkpoints",
    "train.trackers",
}
# Parts of config.json that must be equal for a run to go on.
_COMPARED = ("settings", "preset", "tokenizer", "data", "adapter", "template")


def describe(cfg, backend, loaded, job, parent=None):
    """What config.json holds: settings, versions and fingerprints.

    Args:
        cfg: `config.Config`.
        backend: Keras's name.
        loaded: `presets.Loaded`.
        job: `job.Job`.
        parent: sha256 of the adapter that the run goes on from, or None.
    """
    found = {
        "settings": config.flatten(cfg),
        "backend": backend,
        "versions": runtime.versions(),
        "preset": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint,
        "data": job.fingerprints(),
    }
    if parent:
        found["adapter"] = parent
    if job.usage.jinja:
        source = job.usage.jinja.encode()
        found["template"] = hashlib.sha256(source).hexdigest()
    return found


def differences(old, new):
    """Lines that say how two descriptions of a run differ.

    A setting that one of them lacks, because an older version wrote it, counts
    as its default.
    """
    default = config.flatten(config.Config())
    for section in _COMPARED:
        before, after = old.get(section), new.get(section)
        if section != "settings":
            if None in (before, after) and before != after:
                when = "now" if before is None else "there"
                yield f"  {section}: only {when}"
            elif before != after:
                yield f"  {section}: its content has changed"
            continue
        before, after = default | before, default | after
        for path in sorted({*before, *after} - _FREE):
            if before.get(path) != after.get(path):
                yield (
                    f"  --{path}: {before.get(path)!r} there, "
                    f"{after.get(path)!r} now"
                )
