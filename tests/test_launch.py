"""launch/: notebooks run to their end, scripts refuse, commands are ours."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import numpy as np
import pytest
import yaml
from safetensors import numpy as safetensors

from keras_gemma_ft import command_line, config, embedded

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
NOTEBOOKS = sorted(path.stem for path in LAUNCH.glob("*.ipynb"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
VERBS = {
    path.stem
    for path in (ROOT / "keras_gemma_ft").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
}
# Flags of the tools that launch/ calls, and what a reader replaces.
FOREIGN = {
    "docker": "build-arg gpus",
    "embedded.model": "ffw head_dim hidden layers words",
    "gcloud": "command recurse worker zone",
    "pytest": "dist",
    "pip": "constraint editable no-cache-dir quiet",
    "ruff": "check",
    "skypilot": "env secret",
    "slurm": "cpus-per-task gpus-per-node job-name nodes ntasks-per-node "
    "output signal time",
    "tar": "exclude",
    "usage": "settings",
    "uv": "python seed",
}
pytestmark = pytest.mark.once


def read(name):
    return nbformat.read(LAUNCH / f"{name}.ipynb", as_version=4)


def source(name, cell):
    (found,) = [c.source for c in read(name).cells if c.id == cell]
    return found


def assigned(code):
    """{name: value} of the constants that a cell sets."""
    return {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def text_of(path):
    """A file of launch/ as text; of a notebook, what its cells say."""
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    return "\n\n".join(cell.source for cell in read(path.stem).cells)


def run(command, **kwargs):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, **kwargs
    )


# ---- notebooks


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with data, to work in without network or a user's settings."""
    for split, rows in (("train", 12), ("eval", 3)):
        lines = embedded.demo_file(split).read_text("utf-8").splitlines()
        text = "\n".join(lines[:rows]) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(text, "utf-8")
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("http_proxy", "https_proxy"):
        # Nobody listens there: a download would fail.
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def execute(name, desk, **changes):
    """Runs a notebook; returns {cell id: its outputs} and the run folder."""
    book = read(name)
    values = {
        "PRESET": "gemma2_tiny_en",
        "CONFIG": "configs/demo.py",
        "DEVICE": "cpu",
        "DATA": "train.jsonl",
        "EVAL_DATA": "eval.jsonl",
        "STEPS": 3,
        "RUN_DIR": str(desk / "run"),
        "EXTRA_FLAGS": [
            "--data.sequence_length=96",
            "--data.batch_size=2",
            "--train.log_every=1",
            "--train.samples=2",
            "--train.exact_match=2",
        ],
        **changes,
    }
    (at,) = [
        i
        for i, cell in enumerate(book.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert set(values) <= set(assigned(book.cells[at].source))
    injected = "\n".join(f"{k} = {v!r}" for k, v in values.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(injected))
    client = nbclient.NotebookClient(
        book,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(desk)}},
    )
    client.execute()
    return {cell.id: cell.get("outputs", []) for cell in book.cells}, (
        pathlib.Path(values["RUN_DIR"])
    )


def printed(outputs):
    return "".join(out.get("text", "") for out in outputs)


def shown(outputs, kind):
    return [out.data[kind] for out in outputs if kind in out.get("data", {})]


def check_finished(outputs, run_dir, steps):
    """What a notebook must have shown and left when its run is done."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", steps)
    (image,) = shown(outputs["curves"], "image/png")
    assert image
    scores, samples = shown(outputs["before-after"], "text/plain")
    (row,) = [line for line in scores.splitlines() if "eval_loss" in line]
    losses = [summary["eval_loss_before"], summary["eval_loss"]]
    found = [float(word) for word in row.split()[1:]]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    lines = (run_dir / "samples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0])["reference"][:20] in samples
    with zipfile.ZipFile(f"{run_dir}.zip") as archive:
        names = set(archive.namelist())
        packed = archive.read("adapter/adapter_model.safetensors")
    assert names == {
        "adapter.lora.h5",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/keras_gemma_ft.json",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
    }
    # B starts at zero: what is packed has been trained.
    tensors = safetensors.load(packed)
    assert any(np.any(v) for k, v in tensors.items() if "lora_B" in k)
    (link,) = shown(outputs["download"], "text/html")
    assert f'href="{run_dir.name}.zip"' in link.replace("'", '"')


@pytest.mark.parametrize("name", ["kaggle_tpu", "kaggle_t4x2"])
def test_a_kaggle_notebook_runs_from_plan_to_zip(name, desk):
    outputs, run_dir = execute(name, desk)
    backend = assigned(source(name, "parameters"))["BACKEND"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["backend"] == backend
    assert str(ROOT) in printed(outputs["install"])
    assert "needs no credentials" in printed(outputs["credentials"])
    assert "3 steps on cpu take 0.0 minutes" in printed(outputs["plan"])
    # What train says reaches the cell, its last line among it.
    assert f"all of it is in {run_dir}" in printed(outputs["train"])
    check_finished(outputs, run_dir, steps=3)


def test_the_colab_notebook_stops_in_time_and_goes_on_elsewhere(desk):
    outputs, first = execute("colab", desk, TIME_BUDGET="0.01s")
    said = printed(outputs["train"])
    assert "Stopped after 1 steps; nothing is lost" in said
    assert not (first / "adapter").exists()
    with zipfile.ZipFile(f"{first}.zip") as archive:
        archive.extractall(desk / "saved")
    assert (desk / "saved/checkpoints/00000001").is_dir()
    outputs, second = execute(
        "colab",
        desk,
        RUN_DIR=str(desk / "second"),
        RESUME_FROM=str(desk / "saved"),
    )
    assert "continuing at step 1 of 3" in printed(outputs["train"])
    check_finished(outputs, second, steps=3)


def test_a_plan_that_does_not_fit_ends_the_notebook(desk):
    # 17.2 GiB of weights in 16 bits, 5.7 in NF4; a T4 has 16 GB.
    wanted = {"PRESET": "gemma2_9b_en", "DEVICE": "t4", "CONFIG": ""}
    with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
        execute("colab", desk, **wanted, EXTRA_FLAGS=[])
    assert "gemma2_9b_en does not fit on t4. With EXTRA" in str(caught.value)
    assert "--model.quantize=nf4" in str(caught.value)
    assert not (desk / "run").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_clean_and_names_what_is_there(name):
    book = read(name)
    nbformat.validate(book)
    ids = [cell.id for cell in book.cells]
    assert len({*ids}) == len(ids)
    assert all(re.fullmatch("[a-z-]+", cell) for cell in ids)
    for cell in book.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    values = assigned(source(name, "parameters"))
    recipe = command_line.load_file(ROOT / values["CONFIG"])
    assert recipe.preset == values["PRESET"]
    assert recipe.backend in ("auto", values["BACKEND"])


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("there", [True, False])
def test_installing_keeps_the_images_own_backend(
    name, there, tmp_path, monkeypatch
):
    values = assigned(source(name, "parameters"))
    repository = tmp_path / "input"
    (repository / "keras_gemma_ft").mkdir(parents=True)
    (repository / "keras_gemma_ft/__init__.py").touch()
    (repository / "setup.cfg").touch()
    calls = []
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: ... if there and name == values["BACKEND"] else None,
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: calls.append(command)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    space = {**values, "SOURCE": str(repository)}
    exec(source(name, "install"), space)
    (command,) = calls
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
    assert command[:6] == pip
    root = repository
    if name.startswith("kaggle"):
        root = tmp_path / "keras_gemma_ft"
        assert (root / "setup.cfg").exists(), "inputs are read-only: a copy"
    extra = [str(root)]
    if not there and values["BACKEND"] == "jax":
        extra = [str(root), "jax[tpu]"]
    elif not there:
        extra = [f"{root}[{values['BACKEND']}]"]
    assert command[6:] == extra
    assert space["ROOT"] == root
    assert os.environ["PYTHONPATH"] == str(root)


# ---- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_bash(path):
    done = run(["bash", "-n", str(path)])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "name, words, environment, told",
    [
        ("tpu_vm.sh", [], {}, "Name a verb: bash launch/tpu_vm.sh train"),
        ("tpu_vm.sh", ["--preset=x"], {}, "Name a verb: bash launch/tpu_vm"),
        ("tpu_vm.sh", ["tarin"], {}, "Name a verb: bash launch/tpu_vm.sh"),
        ("tpu_pod.sh", ["train"], {"ZONE": "z"}, "Say which slice: NAME="),
        ("tpu_pod.sh", ["train"], {"NAME": "n"}, "Say which slice: NAME="),
        ("tpu_pod.sh", [], {"NAME": "n", "ZONE": "z"}, "Name a verb: NAME=n"),
        ("slurm.sbatch", [], {}, "Name a verb: sbatch launch/slurm.sbatch"),
        ("slurm.sbatch", ["train"], {}, "No .venv here: install first"),
    ],
)
def test_a_script_refuses_what_lacks(name, words, environment, told, tmp_path):
    clean = {"PATH": os.environ["PATH"], **environment}
    command = ["bash", str(LAUNCH / name), *words]
    done = run(command, env=clean, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(told)


def script(path, text):
    """Writes an executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def environment(folder):
    """A .venv in `folder` whose Python writes down what it is asked to run."""
    # `-c`: what asks whether a module is there.
    script(
        folder / ".venv/bin/python",
        '[ "$1" = -c ] || printf \'%s\\0\' "$@" >words',
    )
    (folder / ".venv/installed-jax").touch()


def words(folder):
    """The words that `environment`'s Python was given."""
    return (folder / "words").read_text().split("\0")[:-1]


def on_path(folder):
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "HOME": str(folder),
    }


# Of a user who likes quotes; each host must get it as it was typed.
TRICKY = '--generate.prompt=it\'s "so" $HOME & more'


def test_a_pod_runs_one_command_on_every_host(tmp_path):
    here = tmp_path / "here"
    shutil.copytree(LAUNCH, here / "launch")
    shutil.copy2(ROOT / "setup.cfg", here)
    script(here / "keras_gemma_ft/generate.py", "")
    (here / "mine.jsonl").write_text("{}\n")
    for private in (".git", ".venv", "runs"):
        (here / private).mkdir()
        (here / private / "stays").touch()
    hosts = [tmp_path / "hosts" / name for name in "ab"]
    for host in hosts:
        environment(host / "keras_gemma_ft")
    script(
        tmp_path / "bin/gcloud",
        f"""
        printf '%s\\n' "$*" >>{tmp_path}/calls
        for host in {tmp_path}/hosts/*; do
          if [ "$4" = scp ]; then cp "$5" "$host/${{6#*:}}"; continue; fi
          command=${{6#--command=}}
          (cd "$host" && bash -c "$command")
        done
        """,
    )
    command = ["bash", str(here / "launch/tpu_pod.sh"), "generate", TRICKY]
    names = {"NAME": "slice", "ZONE": "zone-a"}
    done = run(command, env={**on_path(tmp_path / "bin"), **names})
    assert (done.returncode, done.stderr) == (0, "")
    calls = (tmp_path / "calls").read_text()
    assert calls.count("compute tpus tpu-vm") == 2
    assert calls.count("--zone=zone-a --worker=all") == 2
    for host in hosts:
        there = {path.name for path in (host / "keras_gemma_ft").iterdir()}
        assert there == {
            "launch", "setup.cfg", "keras_gemma_ft", "mine.jsonl", ".venv",
            "words",
        }  # fmt: skip
        assert not list(host.rglob("stays"))
        got = words(host / "keras_gemma_ft")
        assert got == [
            "-m",
            "keras_gemma_ft.generate",
            "--hosts.count=-1",
            TRICKY,
        ]
        assert command_line.from_flags(got[2:]).hosts.count == -1


def test_slurm_runs_the_command_through_srun(tmp_path):
    environment(tmp_path)
    script(tmp_path / "bin/srun", 'echo "$JAX_LOCAL_DEVICE_IDS"; exec "$@"')
    given = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "4"}
    done = run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "generate", TRICKY],
        env={**on_path(tmp_path / "bin"), **given},
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Else JAX gives a task one GPU: that of its number on the host.
    assert done.stdout == "0,1,2,3\n"
    got = words(tmp_path)
    assert got == ["-m", "keras_gemma_ft.generate", "--hosts.count=-1", TRICKY]
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == "1", "one process a host"


# ---- manifests


def test_skypilot_tells_each_node_its_place(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "setup", "run"} <= set(task)
    for block in (task["setup"], task["run"]):
        assert run(["bash", "-n", "-c", block]).returncode == 0
    environment(tmp_path)
    cluster = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    done = run(
        ["bash", "-c", task["run"]],
        env={**on_path(tmp_path), **task["envs"], **cluster},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    got = words(tmp_path)
    assert got[:2] == ["-m", "keras_gemma_ft.train"]
    cfg = command_line.from_flags(got[2:])
    assert (cfg.hosts.count, cfg.hosts.index) == (2, 1)
    assert cfg.hosts.coordinator == "10.0.0.1:1234"
    assert cfg.preset == task["envs"]["PRESET"]


def test_skypilot_installs_jax_for_the_accelerator(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    shutil.copytree(LAUNCH, tmp_path / "launch")
    shutil.copy2(ROOT / "setup.cfg", tmp_path)
    environment(tmp_path)
    done = run(
        ["bash", "-c", task["setup"]],
        env={**on_path(tmp_path), **task["envs"]},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert words(tmp_path) == [
        "-m", "pip", "install", "--quiet", "--constraint",
        "launch/constraints.txt", "jax[tpu]",
    ]  # fmt: skip


def test_the_jobset_has_a_host_for_every_four_chips():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    chips = resources["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    hosts = job["parallelism"] * slices["replicas"]
    assert hosts * chips == np.prod([int(n) for n in topology.split("x")])
    verb, *flags = container["args"]
    assert verb == "keras_gemma_ft.train"
    cfg = command_line.from_flags(flags)
    assert cfg.hosts.count == -1
    (mount,) = container["volumeMounts"]
    for path in (cfg.data.train, cfg.run_dir):
        assert path.startswith(mount["mountPath"] + "/")


def test_the_image_is_made_of_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split() for line in text.splitlines() if line[:1].isupper()]
    copied = [w for step in steps if step[0] == "COPY" for w in step[1:-1]]
    assert "keras_gemma_ft" in copied and "pyproject.toml" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert ["ARG", "EXTRA=jax"] in steps
    assert '".[$EXTRA]"' in text
    (entry,) = [s for s in steps if s[0] == "ENTRYPOINT"]
    assert json.loads(" ".join(entry[1:])) == ["python", "-m"]


# ---- all of it


@pytest.mark.parametrize(
    "path",
    sorted(path for path in LAUNCH.iterdir() if path.suffix != ".png"),
    ids=lambda path: path.name,
)
def test_every_command_names_verbs_and_flags_that_exist(path):
    text = text_of(path)
    # Not keras_gemma_ft.tar.gz.
    verbs = {*re.findall(r"\bkeras_gemma_ft\.([a-z]+)\b(?!\.)", text)}
    verbs |= {*re.findall(r'\brun\(\s*"(\w+)"', text)}
    usage = r'(?:_vm\.sh|_pod\.sh|\.sbatch|\$0) ([a-z]+)(?= --| \\|"|$)'
    verbs |= {*re.findall(usage, text, re.M)}
    assert verbs <= VERBS, verbs - VERBS
    known = {"config"}
    for name, field, _ in config.walk(config.Config()):
        known |= {name, f"no{name}"} if field.type is bool else {name}
    known |= {word for words in FOREIGN.values() for word in words.split()}
    said = {*re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text)}
    assert said <= known, said - known
