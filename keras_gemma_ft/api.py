"""The door for notebooks: tune, look, ask, evaluate, export in five lines.

    import keras_gemma_ft as kgf
    run = kgf.tune(records, data_eval="5%", lora_rank=16)
    run                                 # summary, curves, samples
    run.ask("Set a timer for ten minutes")
    run.export("mine", format="peft,gguf")

Keywords are the flags of the verbs with an underscore for the dot: lora_rank
is --lora.rank. What they do is done by the verbs' own functions.
"""

import base64
import contextlib
import gc
import html
import json
import pathlib
import sys

from keras_gemma_ft import config, keywords, runtime

# The run whose model is in memory, so that the next one can free it.
_loaded = {"run": None}


def tune(*records, **settings):
    """Tunes as `python -m keras_gemma_ft.train` does; goes on where it may.

    Args:
        *records: data_train, if it is given without its keyword.
        **settings: the flags, as in lora_rank=16. data_train and data_eval
            may also be a list of dicts, a pandas.DataFrame or a
            datasets.Dataset, and lora_targets a list of names.

    Returns:
        `Run`. One that was stopped, by time_budget or by the notebook's stop
        button, says so; the same call goes on.

    Raises:
        config.UserError: see the message.
    """
    with _told():
        if len(records) + ("data_train" in settings) > 1:
            raise config.UserError(
                "tune() takes one set of training records, and settings by "
                "their keywords: tune(records, train_steps=100)."
            )
        if records:
            settings["data_train"] = records[0]
        cfg = keywords.configure(settings)
        _free()
        from keras_gemma_ft import train

        try:
            train.train(cfg)
        except runtime.Stopped as stop:
            again = str(stop).replace("same command", "same call")
            runtime.say(f"Stopped: {again}")
        # What is reachable in circles only holds the trained model.
        gc.collect()
    return Run(cfg.run_dir)


@contextlib.contextmanager
def _told():
    """A block whose `UserError`s speak of keywords and hide our frames."""
    try:
        yield
    except config.UserError as error:
        raise config.UserError(keywords.in_keywords(str(error))) from None
    except runtime.Ended as end:
        said = (end.result or {}).get("error", str(end))
        raise config.UserError(keywords.in_keywords(said)) from None


def _free():
    """Gives back the memory of the model that was loaded last."""
    if _loaded["run"] is not None:
        _loaded["run"].session = None
        _loaded["run"] = None
    if keras := sys.modules.get("keras"):
        # Names start afresh: those of a run are the same in every process.
        keras.utils.clear_session()
    gc.collect()


class Run:
    """A run folder, to look at, to ask and to take along.

    Args:
        path: the run folder, of this session or of an earlier one.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path).expanduser()
        self.session = None

    @property
    def summary(self):
        """What summary.json holds; {} before the run has ended or stopped."""
        file = self.path / "summary.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else {}

    @property
    def metrics(self):
        """The lines of metrics.jsonl, as dicts."""
        return self._jsonl("metrics.jsonl")

    @property
    def samples(self):
        """Prompts with their answers before and after, as dicts."""
        return self._jsonl("samples.jsonl")

    def _jsonl(self, name):
        file = self.path / name
        lines = file.read_text("utf-8").splitlines() if file.exists() else ()
        return [json.loads(line) for line in lines]

    def ask(self, question, **settings):
        """Streams the answer and returns it.

        Args:
            question: a str, a list of messages, or a dict of messages and
                tools.
            **settings: flags that are to differ, generate_sampler="top_p".
                The model stays in memory while they are the same.
        """
        with _told(), contextlib.redirect_stderr(sys.stdout):
            if self.session is None or self.session[0] != settings:
                self._load(settings)
            [answer] = self.session[1].answer([question])
        return Answer(answer["completion"])

    def _load(self, settings):
        cfg = keywords.configure({**self._own(), **settings})
        _free()
        runtime.start(cfg)
        from keras_gemma_ft.inference import chat

        self.session = settings, chat.load(cfg)
        _loaded["run"] = self

    def _own(self):
        """The setting that names what was tuned."""
        if (self.path / "model").is_dir():
            return {"preset": self.path / "model"}
        if not (self.path / "adapter").is_dir():
            raise config.UserError(
                f"{self.path} holds no adapter yet: the run is "
                f"{self.summary.get('status', 'not finished')}. Tune on."
            )
        return {"adapter": self.path}

    def evaluate(self, **settings):
        """Scores base and adapter, as the verb does.

        Args:
            **settings: flags; data_eval may be all that `tune` takes, and is
                that of the run where none is given.

        Returns:
            dict: {"base": {"eval_loss": ...}, "adapter": ...}.
        """
        with _told():
            given = {**self._own(), "run_dir": self.path, **settings}
            cfg = keywords.configure(given)
            _free()
            from keras_gemma_ft import evaluate

            found = evaluate.evaluate(cfg)
            gc.collect()
        return found

    def export(self, path, format="peft,keras", **settings):
        """Writes what loads elsewhere, as the verb does, and proves it.

        Args:
            path: a folder that gets a folder for each format.
            format: as --export.format: peft, keras, gguf_adapter, merged_hf,
                merged_keras, gguf, ollama.
            **settings: flags, export_quantize="q8_0".

        Returns:
            dict: the verb's result, with the numbers of each comparison.
        """
        with _told():
            given = {
                **self._own(),
                "run_dir": self.path,
                "export_format": format,
                "export_to": pathlib.Path(path).expanduser(),
                **settings,
            }
            cfg = keywords.configure(given)
            _free()
            from keras_gemma_ft import export

            found = export.export(cfg)
            gc.collect()
        return found

    def __repr__(self):
        told = self.summary
        facts = [f"{k}={told[k]}" for k in _SHOWN if k in told]
        return f"Run({str(self.path)!r}: {', '.join(facts) or 'no summary'})"

    def _repr_html_(self):
        told = self.summary
        rows = [{"": k, "value": told[k]} for k in _SHOWN if k in told]
        parts = [f"<b>{html.escape(str(self.path))}</b>", _table(rows)]
        curves = self.path / "curves.png"
        if curves.exists():
            data = base64.b64encode(curves.read_bytes()).decode()
            parts.append(f'<img src="data:image/png;base64,{data}">')
        return "\n".join([*parts, _table(self.samples)])


def open(path):
    """The `Run` of a folder that `tune` or the train verb wrote.

    Raises:
        config.UserError: the folder holds no run.
    """
    run = Run(path)
    with _told():
        if not (run.path / "config.json").exists():
            raise config.UserError(
                f"{path} holds no run. Expected a run folder, which holds a "
                f'config.json: open("runs/default").'
            )
    return run


# What a look at a run begins with.
_SHOWN = (
    "status", "preset", "steps", "tokens", "train_loss", "eval_loss_before",
    "eval_loss", "exact_match_before", "exact_match", "seconds", "device",
)  # fmt: skip


def _table(rows):
    """Dicts of equal keys as a table in HTML; '' of none."""
    if not rows:
        return ""
    lines = [[f"<th>{html.escape(name)}</th>" for name in rows[0]]]
    lines += [
        [f"<td>{html.escape(str(v))}</td>" for v in row.values()]
        for row in rows
    ]
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in lines)
    return f'<table style="text-align: left">\n{body}</table>'


class Answer(str):
    """A str that a notebook does not show again: it has been streamed."""

    def _ipython_display_(self):
        pass
