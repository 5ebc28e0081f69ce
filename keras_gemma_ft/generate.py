"""Complete prompts, or chat at the terminal, with or without an adapter.

python -m keras_gemma_ft.generate --adapter=runs/default \\
    --generate.prompt='Set a timer for ten minutes'
python -m keras_gemma_ft.generate --adapter=runs/default     (chat)
python -m keras_gemma_ft.generate --adapter=runs/a,runs/b    (one base, both)
"""

import json
import pathlib
import sys

from keras_gemma_ft import config, runtime


def generate(cfg):
    """Returns {"completions": [{"prompt", "completion"}, ...]}.

    Of several adapters each answers: a completion carries "adapter", and
    "switch_ms" tells what a switch from one to the next takes.
    """
    prompts = _prompts(cfg.generate)
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft import workers
    from keras_gemma_ft.inference import chat, switching

    workers.say_one(cfg, backend)
    session = chat.load(cfg)
    if prompts is None:
        result = {"completions": session.talk(sys.stdin)}
    else:
        result = {"completions": session.answer(prompts)}
    if switching.several(cfg.adapter):
        result["switch_ms"] = session.several.adapters.milliseconds()
    return result


def _prompts(settings):
    """The prompts that the flags give; None asks for a chat."""
    if settings.prompt:
        return [settings.prompt]
    if not settings.prompt_file:
        return None
    path = pathlib.Path(settings.prompt_file)
    if not path.is_file():
        raise config.UserError(f"--generate.prompt_file={path}: no such file.")
    try:
        text = path.read_text("utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        if path.suffix == ".jsonl":
            lines = [_question(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise config.UserError(
            f"--generate.prompt_file={path}: expected UTF-8, one prompt a "
            f'line, or in a .jsonl {{"prompt": "..."}} or {{"messages": '
            f'[...]}} a line, with "tools" if there are any '
            f"({type(error).__name__}: {error})."
        ) from None
    if not lines:
        raise config.UserError(
            f"--generate.prompt_file={path}: it holds no prompt."
        )
    return lines


def _question(line):
    """A line's prompt: a str, or with tools a dict of messages and tools."""
    asked = line["messages"] if "messages" in line else line["prompt"]
    if not isinstance(asked, (str, list)):
        raise TypeError(f"{asked!r:.60} is neither a text nor a list of turns")
    if not line.get("tools"):
        return asked
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    return {"messages": asked, "tools": line["tools"]}


if __name__ == "__main__":
    runtime.main(generate, __doc__)
