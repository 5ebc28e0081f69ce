"""The run folder: config.json, metrics.jsonl, summary.json, samples, curves.

Everything here is written whole or line by line, so that whoever reads a run
folder, a person or a resumed run, never sees half a file. Of many processes,
process 0 reads and writes it for all; the others need not see its disk.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import atomic
from keras_gemma_ft.model import hosts
from keras_gemma_ft.tuning import identity

_OWN = (
    "checkpoints",
    "adapter",
    "model",
    "best.safetensors",
    "start.safetensors",
    "adapter.lora.h5",
    "before.json",
    "metrics.jsonl",
    "summary.json",
    "samples.jsonl",
    "curves.png",
    "config.json",
    "trackers.json",
    "tensorboard",
    "wandb",
    "mlruns",
)


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; made where absent.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path).expanduser()
        # Functions that get every metrics line on process 0.
        self.listeners = []
        hosts.once(self._make)

    def _make(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise config.UserError(
                f"--run_dir={self.path} cannot be written ({error.strerror}). "
                f"Choose another: --run_dir=runs/mine."
            ) from None

    @contextlib.contextmanager
    def locked(self):
        """Refuses a second process; the system frees a dead one's lock."""
        with contextlib.ExitStack() as stack:
            hosts.once(lambda: self._lock(stack))
            yield

    def _lock(self, stack):
        file = stack.enter_context(open(self.path / ".lock", "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise config.UserError(
                f"--run_dir={self.path} is in use by another process. "
                f"Wait for it, or choose another folder."
            ) from None

    def open(self, description, *, resume):
        """Starts or continues a run.

        Args:
            description: {"settings": ..., "preset": ..., "data": ...,
                "versions": ...}, written as config.json.
            resume: whether what is there may be continued.

        Returns:
            Whether a run of the same description is there already.

        Raises:
            UserError: the folder holds a run of another description, or
                something else than a run; or processes describe the run, or
                see its folder, differently.
        """
        if hosts.many():
            self._compare(description, resume)
        return hosts.once(lambda: self._open(description, resume))

    def _compare(self, description, resume):
        """Refuses a run that is not the same one on every process."""
        told = json.dumps(description)
        first = json.loads(hosts.broadcast(told.encode()))
        lines = list(identity.differences(first, json.loads(told)))
        if resume != first["settings"]["resume"]:
            lines.append("  --resume is given to some, --noresume to others")
        with hosts.agreed():
            if lines:
                raise config.UserError(
                    "this process was not given what process 0 (there) was:\n"
                    + "\n".join(lines)
                )
        seen = hosts.gather((self.path / "config.json").exists())
        if resume and any(seen) and not seen[0]:
            raise config.UserError(
                f"--run_dir={self.path} holds a run on process "
                f"{seen.index(True)}, but not on process 0, which alone reads "
                f"and writes it. Copy it there, or start afresh with "
                f"--noresume."
            )

    def _open(self, description, resume):
        old = self._description()
        if old and not resume:
            self.clear()
        if not old or not resume:
            self.write("config.json", description)
            return False
        differences = list(identity.differences(old, description))
        if differences:
            raise config.UserError(
                f"--run_dir={self.path} holds another run:\n"
                + "\n".join(differences)
                + "\nUse another --run_dir, or --noresume to start afresh "
                "(what the folder holds is then removed)."
            )
        return True

    def _description(self):
        """The config.json of the run that is here; None where there is none.

        Somebody's model has a config.json too: it must not be cleared away.
        """
        file = self.path / "config.json"
        if not file.exists():
            return None
        with contextlib.suppress(ValueError, AttributeError):
            old = json.loads(file.read_text("utf-8"))
            if old.get("settings"):
                return old
        raise config.UserError(
            f"--run_dir={self.path} holds a config.json that no run wrote. "
            f"Choose another folder: --run_dir=runs/mine."
        )

    def clear(self):
        """Removes what a run writes, and nothing else."""
        for name in _OWN:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write(self, name, value):
        """`value` as the JSON file `name`, complete or absent."""
        self._write(name, json.dumps(value, indent=1, ensure_ascii=False))

    def read(self, name):
        """The JSON file `name`; None where it is absent."""
        return hosts.once(lambda: self._read(self.path / name))

    def _read(self, file):
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def write_lines(self, name, values):
        """`values` as the JSONL file `name`, complete or absent."""
        lines = [json.dumps(v, ensure_ascii=False) for v in values]
        self._write(name, "\n".join(lines))

    def _write(self, name, text):
        data = f"{text}\n".encode() if text else b""
        if hosts.first():
            with atomic.replacing(self.path / name, len(data)) as partial:
                partial.write_bytes(data)

    def append(self, line):
        """One line of metrics.jsonl."""
        if not hosts.first():
            return
        data = f"{json.dumps(line)}\n".encode()
        atomic.append(self.path / "metrics.jsonl", data)
        for tell in self.listeners:
            tell(line)

    def metrics(self):
        """The lines of metrics.jsonl; a torn last line is left out."""
        file = self.path / "metrics.jsonl"
        lines = []
        for text in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
        return lines

    def rewind(self, step):
        """Drops the metrics after `step`, which will be made again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write_lines("metrics.jsonl", kept)

    def draw(self):
        """curves.png: loss, held-out loss and learning rate over steps."""
        if not hosts.first():
            return
        try:
            import matplotlib
        except ModuleNotFoundError:
            runtime.say("matplotlib is not installed: no curves.png")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = self.metrics()
        figure, (upper, lower) = pyplot.subplots(
            2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 1)
        )
        for axes, key, label in (
            (upper, "loss", "training"),
            (upper, "eval_loss", "held out"),
            (lower, "learning_rate", "learning rate"),
        ):
            points = [(m["step"], m[key]) for m in lines if key in m]
            if points:
                style = "o-" if key == "eval_loss" else "-"
                axes.plot(*zip(*points), style, label=label, markersize=4)
        upper.set_ylabel("loss (nats a token)")
        lower.set_ylabel("learning rate")
        lower.set_xlabel("optimizer step")
        if upper.lines:
            upper.legend()
        figure.tight_layout()
        with atomic.replacing(self.path / "curves.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
        pyplot.close(figure)
