"""What card this is, and how what was measured is said."""

import json
import re
import subprocess

from keras_gemma_ft import runtime
from keras_gemma_ft.planning import devices
from tests.benchmarks.gpu import plan

_PACKAGES = (
    "jaxlib", "transformers", "peft", "liger-kernel", "bitsandbytes", "triton",
    "tokamax",
)  # fmt: skip


def card(device, dtype):
    """What is here: {"gpu", "name", "driver", "memory", "flops", "dtype"}.

    Args:
        device: "cpu" or "auto".
        dtype: as --model.dtype.
    """
    if device == "cpu" or not runtime.cuda():
        kind = "float32" if dtype == "auto" else dtype
        return {"gpu": False, "name": "cpu", "driver": "", "flops": 0,
                "memory": devices.host_memory(), "dtype": kind}  # fmt: skip
    name, driver = _nvidia("name"), _nvidia("driver_version")
    kind, _ = runtime.choose_dtype(dtype)
    return {
        "gpu": True, "name": name, "driver": driver,
        "memory": runtime.cuda_memory(), "flops": peak(name), "dtype": kind,
    }  # fmt: skip


def peak(name):
    """FLOP/s in 16 bits of the data sheet of a card; 0 if it is not known.

    Args:
        name: as nvidia-smi tells it: "NVIDIA A100-SXM4-40GB".
    """
    words = set(re.split(r"[\W_]+", name.lower().replace("gb", "")))
    known = [kind for kind in devices.NAMES if set(kind.split("_")) <= words]
    return devices.device(max(known, key=len)).flops if known else 0


def _nvidia(what):
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (text.splitlines() or [""])[0].strip()


def versions():
    """{package: version} of all that decides a number here."""
    import importlib.metadata

    found = runtime.versions()
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def markdown(entries):
    """The table, in the order of `plan.ROWS`."""
    lines = [
        "| step | who | token/s | step, ms | peak GiB | share | "
        "first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in plan.ROWS.items():
        title = row.title
        for entry in (e for e in entries if e["row"] == key):
            lines.append(_line(title, entry))
            title = ""
    return "\n".join(lines)


def _line(title, entry):
    cells = [title, plan.who(entry["contender"])]
    why = entry.get("error") or entry.get("left_out")
    if why:
        what = why if "error" in entry else f"left out: {why}"
        return f"| {' | '.join([*cells, what, '', '', '', ''])} |"
    speed = f"{entry['tokens_per_s']:,.0f}"
    if not entry["finite"]:
        speed += " (loss not finite)"
    share = f"{entry['share']:.2f}" if "share" in entry else ""
    cells += [
        speed, f"{entry['step_ms']:.1f}", f"{entry['peak_gib']:.1f}", share,
        f"{entry['first_step_s']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def ratios(entries):
    """{row: {"ours/theirs": {"speed", "memory"}}}, of what was measured."""
    found = {}
    for row in plan.ROWS:
        done = {
            e["contender"]: e
            for e in entries
            if e["row"] == row and "tokens_per_s" in e
        }
        for ours, mine in done.items():
            for theirs, other in done.items():
                if ours.startswith("ours") and not theirs.startswith("ours"):
                    found.setdefault(row, {})[f"{ours}/{theirs}"] = {
                        "speed": _ratio(mine, other, "tokens_per_s"),
                        "memory": _ratio(mine, other, "peak_gib"),
                    }
    return found


def _ratio(mine, other, key):
    return round(mine[key] / other[key], 3) if other[key] else None


def line(**values):
    """The last line: JSON, which knows no NaN."""
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
