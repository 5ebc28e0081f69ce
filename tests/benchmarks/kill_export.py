"""An export, killed at random instants: what is there is whole, or is not there.

    python -m tests.benchmarks.kill_export --run_dir=runs/default --kills=50

Each time the verb is started as a process of its own and killed (SIGKILL) at a
random instant of its life. Then no format's folder may be there, or it is one
that was exported in full: its record, its card and every file of the first,
undisturbed export. The last export is not killed and must succeed.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

FORMATS = "peft,keras,merged_hf,merged_keras"


def _command(run_dir, folder):
    return [
        sys.executable, "-m", "keras_gemma_ft.export", f"--run_dir={run_dir}",
        f"--format={FORMATS}", f"--to={folder}", "--noverify",
    ]  # fmt: skip


def _whole(folder, want):
    return {p.name for p in folder.iterdir()} == want


def kill(run_dir, folder, kills, *, seed=0):
    """{"kills", "half", "absent", "whole"}: how often which was found.

    Args:
        run_dir: a run with an adapter.
        folder: an empty folder.
        kills: how often.
        seed: of the instants.
    """
    first = pathlib.Path(folder) / "first"
    began = time.monotonic()
    subprocess.run(_command(run_dir, first), check=True, capture_output=True)
    life = time.monotonic() - began
    names = {p.name: {q.name for q in p.iterdir()} for p in first.iterdir()}
    told = {"kills": kills, "half": 0, "absent": 0, "whole": 0}
    chance = random.Random(seed)
    for number in range(kills):
        out = pathlib.Path(folder) / f"killed-{number}"
        process = subprocess.Popen(
            _command(run_dir, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Most of its life goes by in imports: the end is where it writes.
        time.sleep(life * chance.uniform(0.5, 1.0))
        process.kill()
        process.wait()
        for what, want in names.items():
            place = out / what
            if not place.exists():
                told["absent"] += 1
            else:
                told["whole" if _whole(place, want) else "half"] += 1
    subprocess.run(_command(run_dir, out), check=True, capture_output=True)
    for what, want in names.items():
        told["half"] += not _whole(out / what, want)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", default="runs/default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = kill(asked.run_dir, folder, asked.kills, seed=asked.seed)
    print(json.dumps(told))
    sys.exit(told["half"] > 0)


if __name__ == "__main__":
    main()
