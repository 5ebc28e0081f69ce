"""Each recipe of configs/ loads, is sound, and tells its own story."""

import ast
import pathlib
import runpy
import shlex
import sys

import pytest

from keras_gemma_ft import command_line, config

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
pytestmark = pytest.mark.once


def command(path):
    """The arguments of the docstring's train command."""
    # A backslash at a line's end joins it to the next, as in a shell.
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    (line,) = [
        line
        for line in doc.splitlines()
        if line.startswith("python -m keras_gemma_ft.train")
    ]
    return shlex.split(line)[3:]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_loads_and_tells_its_story(path):
    found = command_line.load_file(path)
    command_line.check(found)
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 40
    doc = ast.get_docstring(ast.parse(text))
    assert f"--config=configs/{path.name}" in doc
    assert "Hardware: " in doc, "for whom is it?"
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipes_command_is_understood(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = command(path)
    assert argv[0] == f"--config=configs/{path.name}"
    found = command_line.from_flags(argv)
    recipe = config.flatten(command_line.load_file(path))
    said = {word[2:].partition("=")[0] for word in argv[1:]}
    changed = {k for k, v in config.flatten(found).items() if v != recipe[k]}
    assert changed <= said


def test_recipes_write_to_folders_of_their_own():
    folders = [command_line.load_file(path).run_dir for path in CONFIGS]
    assert len({*folders}) == len(folders), folders


def test_the_demo_recipe_is_what_train_runs_without_a_flag():
    demo = command_line.load_file(ROOT / "configs/demo.py")
    assert demo == command_line.from_flags([])


@pytest.mark.parametrize("verb", config.VERBS)
@pytest.mark.parametrize("asked", ["--help", "--helpfull"])
def test_each_verbs_help(verb, asked, monkeypatch, capsys):
    # In this process: run as a module it would cost a start each.
    path = ROOT / f"keras_gemma_ft/{verb}.py"
    monkeypatch.setattr(sys, "argv", [verb, asked])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    told = capsys.readouterr().out
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False)
    assert told.startswith(doc.strip().splitlines()[0])
    assert f"python -m keras_gemma_ft.{verb}" in told
    for name, field, _ in config.walk(config.Config()):
        wanted = asked == "--helpfull" or config.VERBS[verb].reads(name)
        shown = f"\n  --{name}=" in told and field.metadata["help"] in told
        assert shown == wanted, name
    assert "  --config=" in told
