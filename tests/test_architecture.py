"""Imports point down, importing does no work, nothing is left untested."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import keras_gemma_ft

PACKAGE = pathlib.Path(keras_gemma_ft.__file__).parent
NAME = PACKAGE.name
DOOR = f"{NAME}.api"
# What a part may import besides itself; lower lines never import higher ones.
BELOW = {
    "config": {"config"},
    "command_line": {"config"},
    "runtime": {"config", "command_line"},
    "keywords": {"config", "command_line", "formats"},
    "embedded": {"config", "runtime"},
    "data": {"config"},
    "formats": {"config"},
    "family": {"runtime"},
    "workers": {"config", "runtime", "data", "family"},
    "model": {"config", "runtime", "workers", "embedded", "data", "formats"},
}
BELOW["inference"] = BELOW["model"] | {"model"}
BELOW["checking"] = BELOW["inference"] | {"inference"}
BELOW["exporting"] = BELOW["checking"] | {"checking"}
BELOW["serving"] = BELOW["inference"] | {"inference"}
BELOW["tuning"] = BELOW["inference"] | {"inference"}
BELOW["planning"] = BELOW["tuning"] | {"tuning"}
FRAMEWORKS = {"keras", "keras_hub", "jax", "torch", "tensorflow"}
# Heavy, or there on some machines only: imported where they are needed.
LATE = FRAMEWORKS | {
    "datasets", "google", "gguf", "grain", "huggingface_hub", "jinja2",
    "kagglehub", "llama_cpp", "matplotlib", "mlflow", "peft", "pyarrow",
    "resource", "sentencepiece", "starlette", "subprocess", "tensorboardX",
    "tokamax", "tokenizers", "tqdm", "transformers", "uvicorn", "wandb",
}  # fmt: skip


# Files of more than 300 lines, and why each stays whole so far.
LONG = {
    "config/elsewhere.py": "one table of other tools' words",
    "embedded/sentences.py": "one list of sentences",
}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(tree):
    """Yields (module, whether it is deferred) of each import in a tree."""
    for node in ast.walk(tree):
        late = node not in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in FILES else node.module), late


def part(name):
    return name.split(".")[1] if "." in name else ""


def is_script(name):
    """A verb, or a module of `embedded` that is run: it starts the runtime.

    So does the door for notebooks, which calls the verbs.
    """
    if name == DOOR:
        return True
    return 'if __name__ == "__main__":' in FILES[name].read_text()


def test_imports_point_down():
    wrong = [
        f"{name} imports {other}"
        for name, tree in TREES.items()
        if part(name) in BELOW
        for other, late in imports(tree)
        if other.startswith(NAME)
        and part(other) not in BELOW[part(name)] | {part(name)}
        and not (late and is_script(name))
    ]
    assert not wrong, "\n".join(wrong)
    verbs = {n for n in FILES if part(n) not in BELOW and n != NAME}
    assert verbs and all(map(is_script, verbs)), verbs


def test_what_needs_no_backend_imports_none():
    wrong = [
        f"{name} imports {other}"
        for name, tree in TREES.items()
        for other, late in imports(tree)
        if other.partition(".")[0] in FRAMEWORKS
        and (part(name) in ("config", "runtime", "data", "formats") or not late)
        and (name, late) != (f"{NAME}.runtime.imports", True)
        and part(name)
        not in (
            "model",
            "inference",
            "checking",
            "exporting",
            "tuning",
            "planning",
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_small_enough_to_see():
    long = {
        str(path.relative_to(PACKAGE))
        for path in FILES.values()
        if path.read_text().count("\n") > 300
    }
    assert long == set(LONG)


def test_there_are_no_cycles():
    graph = {
        name: {other for other, _ in imports(tree) if other in FILES} - {name}
        for name, tree in TREES.items()
    }
    # Raises CycleError, which names the modules of the cycle.
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(FILES)


def test_only_verbs_defer_imports_of_our_own():
    wrong = [
        f"{name} defers {other}"
        for name, tree in TREES.items()
        for other, late in imports(tree)
        if late and not is_script(name) and other.partition(".")[0] not in LATE
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_say_what_they_are_and_do_nothing_on_import():
    passive = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef,
        ast.ClassDef, ast.Assign, ast.AnnAssign,
    )  # fmt: skip
    wrong = []
    for name, tree in TREES.items():
        if not ast.get_docstring(tree):
            wrong.append(f"{name} has no docstring")
        end = -1 if is_script(name) and name != DOOR else None
        body = tree.body[1:end]
        wrong += [
            f"{name}, line {node.lineno}: {ast.unparse(node)[:40]}"
            for node in body
            if not isinstance(node, passive)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("parts", [("data", "formats"), ()])
def test_importing_starts_no_framework(parts):
    names = [
        name
        for name in FILES
        if part(name) in (parts or {part(n) for n in FILES} - {*BELOW})
    ]
    code = (
        f"import sys, {', '.join(names)}\n"
        f"print({FRAMEWORKS} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_every_module_is_reached_from_a_test():
    here = pathlib.Path(__file__).parent
    said = set()
    for path in here.rglob("*.py"):
        if path.name == pathlib.Path(__file__).name:
            continue
        text = path.read_text()
        said |= {other for other, _ in imports(ast.parse(text))}
        # Verbs that a test runs as a process.
        said |= set(re.findall(rf"{NAME}\.\w+", text))
    reached, new = set(), said & set(FILES)
    while new:
        reached |= new
        new = {
            other for name in new for other, _ in imports(TREES[name])
        } & set(FILES) - reached
    modules = {n for n, path in FILES.items() if path.name != "__init__.py"}
    missing = sorted(modules - reached)
    assert not missing, f"no test reaches {', '.join(missing)}"


def tree(folder=PACKAGE, depth=1):
    """The lines of the package's README that name every module."""

    def line(name, path):
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        return f"{'  ' * depth}{name:{22 - 2 * depth}}  {told.splitlines()[0]}"

    inner = [path for path in folder.iterdir() if (path / PARTS).exists()]
    lines = [
        line(path.name, path)
        for path in sorted(folder.glob("*.py"))
        if path.name != PARTS
    ]
    for path in sorted(inner):
        lines.append(line(f"{path.name}/", path / PARTS))
        lines += tree(path, depth + 1)
    return lines


PARTS = "__init__.py"
MAP = re.compile(rf"(?s)(?<=\n```\n{NAME}/\n).*?(?=```\n)")


def test_the_packages_readme_names_every_module():
    text = (PACKAGE / "README.md").read_text("utf-8")
    [there] = MAP.findall(text)
    # `python tests/test_architecture.py` writes it.
    assert there.splitlines() == tree()


if __name__ == "__main__":
    page = PACKAGE / "README.md"
    lines = "".join(f"{line}\n" for line in tree())
    page.write_text(MAP.sub(lambda _: lines, page.read_text("utf-8")), "utf-8")
