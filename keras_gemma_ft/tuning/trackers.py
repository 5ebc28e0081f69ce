"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each gets every line of metrics.jsonl under the same names, the settings, and
at the end summary.json. trackers.json in the run folder keeps what a tracker
calls the run, so that a run that goes on goes on there too.
"""

import contextlib
import importlib.util
import json
import os
import time

from keras_gemma_ft import config, runtime
from keras_gemma_ft.model import hosts

# What is imported; also what pip installs. tensorboardX, since the writer of
# Keras needs TensorFlow and Torch's needs Torch.
MODULES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
_PROJECT = "keras_gemma_ft"


def named(setting):
    """The trackers that `--train.trackers` names, each once.

    Raises:
        config.UserError: a library is not installed, or nobody is logged in;
            the message says what to type.
    """
    names = dict.fromkeys(name.strip() for name in setting.split(","))
    names = [name for name in names if name]
    missing = [
        MODULES[name]
        for name in names
        if importlib.util.find_spec(MODULES[name]) is None
    ]
    if missing:
        raise config.UserError(
            f"--train.trackers={setting}: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. "
            f"Type: pip install {' '.join(missing)}"
        )
    return names


@contextlib.contextmanager
def following(cfg, folder):
    """A block in which the trackers get what `folder` gets.

    Args:
        cfg: `config.Config`; train.trackers names the trackers.
        folder: `RunFolder`, open, before its metrics are rewound.
    """
    names = named(cfg.train.trackers) if hosts.first() else []
    if not names:
        yield
        return
    # A run that goes on makes again what came after its checkpoint.
    before = folder.metrics()
    sent, trackers = {_key(line) for line in before}, []
    ended = "failed"

    def tell(line):
        if _key(line) not in sent:
            for tracker in trackers:
                tracker.log(line["step"], numbers(line))

    try:
        for name in names:
            trackers.append(_open(name, cfg, folder, before))
        folder.listeners.append(tell)
        yield
        ended = "done"
    except runtime.Stopped:
        ended = "stopped"
        raise
    finally:
        facts = {} if ended == "failed" else folder.read("summary.json")
        for tracker in trackers:
            tracker.close(facts, ended)


def _open(name, cfg, folder, before):
    """A tracker, on the run that trackers.json names or on a new one."""
    known = folder.read("trackers.json") or {}
    settings = config.flatten(cfg)
    tracker = TRACKERS[name](folder.path, settings, known.get(name))
    folder.write("trackers.json", {**known, name: tracker.id})
    # One that the run has not had so far gets all that it has missed.
    for line in before if name not in known else ():
        tracker.log(line["step"], numbers(line))
    return tracker


def _key(line):
    return line["step"], *line


def numbers(line):
    """{name: number} of a metrics line; a dict's items are `name.item`."""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            inner = {f"{name}.{k}": v for k, v in value.items()}
            found |= numbers(inner)
        elif name != "step" and type(value) in (int, float):
            # MLflow asks TensorFlow, which is barred here, of whole numbers.
            found[name] = float(value)
    return found


class TensorBoard:
    """Event files in the run folder's `tensorboard`, by tensorboardX.

    Args:
        path: the run folder.
        settings: {path: value}, the hyper-parameters.
        id: what this tracker has called the run before; None is a new one.
    """

    def __init__(self, path, settings, id):
        import tensorboardX

        self.id, self.settings = "tensorboard", settings
        place = path / self.id
        # Their names are of whole seconds: a second would replace a first.
        number = len(list(place.glob("events.*")))
        self.writer = tensorboardX.SummaryWriter(
            str(place), filename_suffix=f".{number}"
        )
        self.last = 0

    def log(self, step, values):
        self.last = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # Else a process that is killed takes two minutes of lines along.
        self.writer.flush()

    def close(self, facts, ended):
        from tensorboardX import summary

        found = {f"summary/{k}": v for k, v in numbers(facts).items()}
        for name, value in found.items():
            self.writer.add_scalar(name, value, self.last)
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        self.writer.add_text("summary", f"```\n{text}\n```", self.last)
        # Not add_hparams, which writes a second run beside this one.
        for part in summary.hparams(self.settings, found):
            self.writer.file_writer.add_summary(part)
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the folder.

    Args: as `TensorBoard`.
    """

    def __init__(self, path, settings, id):
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=path.name,
                id=id,
                resume="allow",
                dir=str(path),
                config=settings,
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise config.UserError(
                f"--train.trackers=wandb: {error} Type wandb login first, or "
                f"set WANDB_MODE=offline."
            ) from None
        self.id = self.run.id

    def log(self, step, values):
        self.run.log(values, step=step)

    def close(self, facts, ended):
        self.run.summary.update(facts)
        self.run.finish(exit_code=int(ended == "failed"))


class MLflow:
    """A run of MLflow: MLFLOW_TRACKING_URI's, or in the folder's `mlruns`.

    Args: as `TensorBoard`.
    """

    def __init__(self, path, settings, id):
        import mlflow

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            place = (path / "mlruns").absolute().as_uri()
            # MLflow 3 reads folders, and refuses to until it is told so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.client = mlflow.MlflowClient(tracking_uri=place)
        self.id = id or self._make(path.name, settings)
        self.client.update_run(self.id, status="RUNNING")

    def _make(self, name, settings):
        from mlflow import entities

        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self.client.get_experiment_by_name(project)
        experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(project)
        )
        id = self.client.create_run(experiment, run_name=name).info.run_id
        given = [entities.Param(k, str(v)) for k, v in settings.items()]
        # A request holds at most 100.
        for start in range(0, len(given), 100):
            self.client.log_batch(id, params=given[start : start + 100])
        return id

    def log(self, step, values):
        from mlflow import entities

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id,
            metrics=[
                entities.Metric(name, value, now, step)
                for name, value in values.items()
            ],
        )

    def close(self, facts, ended):
        self.client.log_dict(self.id, facts, "summary.json")
        for name, value in facts.items():
            self.client.set_tag(self.id, f"summary.{name}", str(value))
        status = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, status[ended])


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
