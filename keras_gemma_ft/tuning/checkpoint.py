"""Checkpoints: all that a run needs to go on, and to end in the same bits.

`checkpoints/<step>/` holds `state.safetensors` (what is trained, the optimizer,
the seeds, the counts of overflows) and `state.json` (the step, the best
evaluation, the tensors' length, and a sha256 over all of it). The folder is
there whole or not at all. Where the run is in its data is not saved: the order
of the rows follows from the seed and the step.
"""

import json
import pathlib
import shutil

from safetensors import numpy as safetensors

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import atomic
from keras_gemma_ft.formats import checkpoints as stored
from keras_gemma_ft.model import hosts


def variables(tuner):
    """{name: variable} of everything that changes during a run."""
    named = {}
    groups = {
        "trainable": tuner.trainable_variables,
        "optimizer": tuner.optimizer.variables,
        "state": tuner.states,
    }
    for group, variables in groups.items():
        for i, variable in enumerate(variables):
            # The index: optimizer slots of two variables may share a path.
            named[f"{group}/{i}/{variable.path}"] = variable
    return named


def save(run_dir, tuner, facts):
    """Writes `checkpoints/<step>/`, on process 0; all must call it.

    Args:
        run_dir: the run folder.
        tuner: the `FineTuner`, its variables current.
        facts: JSON-able dict with "step"; comes back from `restore`.
    """
    arrays = {
        name: hosts.whole(variable.value)
        for name, variable in variables(tuner).items()
    }
    if not hosts.first():
        return
    folder = pathlib.Path(run_dir) / "checkpoints"
    data = safetensors.save(arrays)
    final = folder / f"{facts['step']:08d}"
    with atomic.replacing(final, len(data)) as partial:
        partial.mkdir()
        (partial / "state.safetensors").write_bytes(data)
        state = {
            **facts,
            "bytes": len(data),
            "sha256": stored.digest(facts, data),
        }
        (partial / "state.json").write_text(json.dumps(state, indent=1))


def prune(run_dir, keep):
    """Removes all but the newest `keep` checkpoints, on process 0."""
    if not hosts.first():
        return
    for old in checkpoints(run_dir)[: -max(1, keep)]:
        shutil.rmtree(old)


def checkpoints(run_dir):
    """The checkpoint folders, oldest first, not verified."""
    folder = pathlib.Path(run_dir) / "checkpoints"
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def latest(run_dir):
    """(folder, facts) of the newest checkpoint that is whole, or None."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            facts, _ = stored.verified(folder)
        except (OSError, ValueError) as error:
            runtime.say(
                f"checkpoint {folder.name} is damaged ({error}); "
                f"looking for an older one"
            )
            continue
        return folder, facts
    return None


def newest(run_dir):
    """What `latest` gives on process 0, on every process."""

    def told():
        found = latest(run_dir)
        return found and [str(found[0]), found[1]]

    found = hosts.once(told)
    return found and (pathlib.Path(found[0]), found[1])


def load(path):
    """{name: array} of the safetensors file that process 0 has at `path`."""
    if not hosts.many():
        return safetensors.load_file(path)
    data = pathlib.Path(path).read_bytes() if hosts.first() else b""
    return safetensors.load(hosts.broadcast(data))


def restore(folder, tuner):
    """Puts a checkpoint's values into the tuner's variables.

    Raises:
        UserError: it is of another model, optimizer or adapter shape; every
            difference is listed.
    """
    arrays = load(folder / "state.safetensors")
    named = variables(tuner)
    wrong = [f"{name}: not in this run" for name in arrays.keys() - named]
    for name, variable in named.items():
        if name not in arrays:
            wrong.append(f"{name}: not in the checkpoint")
        elif arrays[name].shape != tuple(variable.shape):
            wrong.append(
                f"{name}: {arrays[name].shape} in the checkpoint, "
                f"{tuple(variable.shape)} in this run"
            )
    if wrong:
        raise config.UserError(
            f"{folder} is of another run:\n"
            + "\n".join(sorted(wrong)[:20])
            + "\nUse another --run_dir, or --noresume to start afresh."
        )
    for name, variable in named.items():
        variable.assign(arrays[name])
