"""The verbs: their list, their ways to be run, and what each of them reads."""

import configparser
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from keras_gemma_ft import command_line, config
from keras_gemma_ft.config import VERBS, Config

pytestmark = pytest.mark.once
ROOT = pathlib.Path(config.__file__).parents[2]
PATHS = list(config.flatten(Config()))
CONSOLE = "from keras_gemma_ft.__main__ import main; main()"


def run(*words):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT
    )


def shown(text):
    """The settings that a help text shows, in its order."""
    return re.findall(r"^  --([\w.]+)=", text, re.M)


def test_every_verb_is_declared_and_has_a_line():
    files = (ROOT / "keras_gemma_ft").glob("*.py")
    scripts = {f.stem for f in files if "runtime.main(" in f.read_text("utf-8")}
    assert scripts == set(VERBS)
    sections = {path.partition(".")[0] for path in PATHS if "." in path}
    for verb in VERBS.values():
        assert len(set(verb.first)) == 12
        assert {*verb.first, *verb.more} <= {*PATHS, *sections}


def test_the_list_of_verbs():
    listed = run("-m", "keras_gemma_ft")
    assert listed.returncode == 0
    for name in VERBS:
        module = importlib.import_module(f"keras_gemma_ft.{name}")
        line = f"  {name:9} {module.__doc__.splitlines()[0]}\n"
        assert line in listed.stdout
    unknown = run("-m", "keras_gemma_ft", "trian", "--seed=1")
    assert unknown.returncode == 2
    assert "'trian' is no verb. Did you mean: train?" in unknown.stderr
    assert listed.stdout in unknown.stderr
    assert json.loads(unknown.stdout)["status"] == "error"


@pytest.mark.parametrize("argv", [["--help"], ["--rank=3"]])
def test_a_verb_is_run_in_three_ways(argv):
    asked = run("-m", "keras_gemma_ft.generate", *argv)
    both = asked.returncode, asked.stdout, asked.stderr
    assert asked.returncode == (0 if argv == ["--help"] else 2), both
    for way in (["-m", "keras_gemma_ft"], ["-c", CONSOLE]):
        other = run(*way, "generate", *argv)
        assert (other.returncode, other.stdout, other.stderr) == both
    if argv == ["--help"]:
        doc = importlib.import_module("keras_gemma_ft.generate").__doc__
        assert asked.stdout == command_line.help_text(doc, "generate") + "\n"
        full = run("-m", "keras_gemma_ft.generate", "--helpfull")
        assert full.stdout == command_line.help_text(doc) + "\n"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    script = setup["options.entry_points"]["console_scripts"].strip()
    assert script == "keras-gemma-ft = keras_gemma_ft.__main__:main"


def test_help_shows_what_a_verb_reads_and_the_dozen_first():
    for name, verb in VERBS.items():
        paths = shown(command_line.help_text("Doc.", name))
        assert tuple(paths[:12]) == verb.first
        assert len(set(paths)) == len(paths)
        read = {path for path in PATHS if verb.reads(path)}
        assert set(paths) == read | {"config"}
    assert sorted(shown(command_line.help_text("Doc."))) == sorted(
        [*PATHS, "config"]
    )
    # What asks needs no setting of how it was trained.
    asked = shown(command_line.help_text("Doc.", "generate"))
    assert not [path for path in asked if path.startswith(("train.", "lora."))]
    assert len(asked) < 30


def test_help_may_be_read_in_part():
    there, here = os.pipe()
    os.close(there)  # As `head` does when it has had enough.
    done = subprocess.run(
        [sys.executable, "-m", "keras_gemma_ft.plan", "--helpfull"],
        stdout=here,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(here)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_flag_that_a_verb_does_not_read_is_told():
    done = run(
        *"-m keras_gemma_ft generate --train.steps 3 --nodata.pack".split(),
        *"--generate.top_k=3 --generate.prompt_file=none".split(),
    )
    told = "generate does not read --train.steps, --data.pack\n"
    assert told in done.stderr
    assert "--generate.prompt_file=none: no such file" in done.stderr
    assert done.returncode == 2
    for name in VERBS:
        argv = [f"--{path}=1" for path in VERBS[name].first]
        assert not command_line.unread([*argv, "--config=x.py"], name)


@pytest.mark.parametrize(
    "name, argv",
    [
        ("generate", ["--generate.prompt=hi", "--generate.max_new_tokens=2"]),
        ("plan", ["--preset=gemma2_2b_en", "--device=t4"]),
        ("evaluate", ["--train.exact_match=0", "--train.samples=0"]),
    ],
)
def test_what_a_verb_reads_is_declared(monkeypatch, name, argv):
    """Every look at a setting is recorded while the verb runs."""
    cfg = command_line.from_flags(argv)
    seen = set()

    def watch(kind, prefix):
        def get(self, field):
            # The package of the settings itself looks at all of them.
            file = sys._getframe(1).f_code.co_filename
            if "keras_gemma_ft" in file and "/config/" not in file:
                seen.add(prefix + field)
            return object.__getattribute__(self, field)

        monkeypatch.setattr(kind, "__getattribute__", get, raising=False)

    watch(Config, "")
    for path in PATHS:
        section = path.rpartition(".")[0]
        if section:
            watch(type(getattr(cfg, section)), f"{section}.")
    verb = importlib.import_module(f"keras_gemma_ft.{name}")
    assert getattr(verb, name)(cfg)
    read = seen & set(PATHS)
    assert {"preset", "data.batch_size"} <= read
    # The rows and the start of adapters only decide how weights are loaded;
    # held-out prompts are answered with a sampler that is not the user's.
    allowed = {"data.batch_size", "data.micro_batch_size", "lora.init"}
    allowed |= {"generate.sampler"} if name == "evaluate" else set()
    unsaid = {p for p in read - allowed if not VERBS[name].reads(p)}
    assert not unsaid
