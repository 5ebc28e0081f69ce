"""The pages for people: short, their links lead somewhere, their commands run."""

import pathlib
import re

import pytest

from keras_gemma_ft import config

HOME = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [HOME / "README.md", *HOME.glob("*/*.md")]
    if path.parent.name
    in ("keras_gemma_ft", "configs", "launch", "tests", HOME.name)
)
# Flags of the benchmarks' own command lines, and of other programs.
BENCHMARKS = (
    "against backend budget check contenders formats device dtype ffw head_dim hidden "
    "kills launches layers mesh quick rows size step words"
)
OTHERS = {
    "README.md": {"lora"},
    "tests/README.md": set(BENCHMARKS.split()),
    "launch/README.md": set(BENCHMARKS.split()),
    "configs/README.md": {"lora", "tool-call-parser"},
    "keras_gemma_ft/README.md": {"hosts"},
}


def anchors(path):
    """The #fragments that the headings of a page make."""
    heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {
        re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
        for head in heads
    }


def test_the_first_page_is_one_page():
    lines = (HOME / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150 and len(PAGES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(HOME)))
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page}: {target}"
        assert not fragment or fragment in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(HOME)))
def test_what_is_typed_exists(page):
    text = page.read_text("utf-8")
    known = {path for path, _, _ in config.walk(config.Config())}
    # A verb's own section may be left out.
    known |= {path.removeprefix("export.") for path in known}
    known |= {f"no{path}" for path in known} | {"config", "help", "helpfull"}
    known |= OTHERS.get(str(page.relative_to(HOME)), set())
    known |= {re.sub(r"(\w+)\.(\w+)", r"no\1.\2", path) for path in known}
    flags = re.findall(r"(?<![\w-])--([A-Za-z_][\w.-]*\w)", text)
    assert not {flag for flag in flags if flag not in known}
    for module in re.findall(r"python -m\s+([\w.]+\w)", text):
        if module.endswith(".NAME"):
            continue
        path = HOME / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module
    for script in re.findall(r"bash\s+(launch/[\w.]+)", text):
        assert (HOME / script).exists(), script
    for verb in re.findall(r"keras-gemma-ft (\w+)", text):
        assert verb in config.VERBS or verb == "VERB", verb
    for path in re.findall(r"--config=(configs/\w+\.py)", text):
        assert (HOME / path).exists(), path
