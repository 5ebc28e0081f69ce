"""configs/ELSEWHERE.md: the settings of other tools, and what to type here.

Written anew, in the repository's root, by
    python -c "from keras_gemma_ft.config import page; page.write()"
"""

import pathlib

from keras_gemma_ft.config import elsewhere

_HEAD = """\
# What you may know by another name

The settings of Unsloth, TRL (with PEFT), Axolotl, LLaMA-Factory and of KerasHub
notebooks, and what to type here. A command that uses a name of the first column
is answered with the whole corrected command, values converted. For `lora_r=16`,
`per_device_train_batch_size=2` and `gradient_accumulation_steps=8` it is

```
--lora.rank=16 --data.micro_batch_size=2 --data.batch_size=16
```

Written from the table in `keras_gemma_ft/config/elsewhere.py` by
`python -c "from keras_gemma_ft.config import page; page.write()"`.
"""


def page():
    """The table as Markdown."""
    lines = [_HEAD]
    for title, words in elsewhere.TABLE.items():
        lines += [f"## {title}", ""]
        lines += ["| elsewhere | here | remark |", "|---|---|---|"]
        for word in words:
            names = ", ".join(f"`{name}`" for name in word.names.split())
            lines.append(f"| {names} | {_shown(word)} | {_remark(word)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(word):
    """What to type, as the page shows it."""
    if not word.here:
        return "nothing"
    return f"`--{word.here}`" + (f" (off: `--{word.off}`)" if word.off else "")


def _remark(word):
    pairs = word.values.items() if isinstance(word.values, dict) else ()
    same = [f"`{a}` is `{b}`" for a, b in pairs if b]
    return " ".join(filter(None, [word.note, ", ".join(same)]))


def write(path="configs/ELSEWHERE.md"):
    """Writes the page, in the repository's root."""
    pathlib.Path(path).write_text(page(), "utf-8")
