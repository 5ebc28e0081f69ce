"""The chat template of a base model, where it is not that of Gemma's turns.

A model that others have tuned on ChatML, say, understands ChatML. Its folder
has the template: `chat_template.jinja`, or in `tokenizer_config.json`.
"""

import pathlib

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import chat_template, jinja
from keras_gemma_ft.formats import usage
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.formats.peft_config import CONFIG as ADAPTER
from keras_gemma_ft.model import preset_source


def find(source):
    """The file with the template of a folder; None where there is none.

    Args:
        source: what `preset_source.resolve` gave, or an adapter's folder.
    """
    adapter = source and (pathlib.Path(source) / ADAPTER).is_file()
    if not adapter and not preset_source.is_huggingface(source):
        return None
    file, settings = source / "chat_template.jinja", "tokenizer_config.json"
    if file.is_file():
        return file
    if (source / settings).is_file():
        if read_json(source / settings).get("chat_template"):
            return source / settings
    return None


def text(source):
    """The source of a folder's template; "" where there is none to be read."""
    file = find(source)
    try:
        return jinja.read(file) if file else ""
    except config.UserError:
        # `settle` says so, if it is to be used.
        return ""


def _of_adapter(cfg):
    """The file with the template that lies beside an adapter, or None."""
    if not cfg.adapter or not pathlib.Path(cfg.adapter).is_dir():
        return None
    return find(pathlib.Path(cfg.adapter))


def settle(cfg, tokenizer):
    """`cfg` with the base's template, if it has one of its own.

    What the user has typed wins over it, and so does what an adapter was
    taught with; each is said.

    Args:
        cfg: `config.Config`, with what travels with its adapter.
        tokenizer: `data.tokens.Tokenizer` of the base.

    Raises:
        config.UserError: the template is broken and no other was typed.
    """
    _, found = usage.find(cfg.adapter or cfg.preset)
    if found and "data.template" in found.told["settings"]:
        return cfg
    file = _of_adapter(cfg) or find(preset_source.resolve(cfg.preset))
    if file is None or cfg.data.format == "text":
        return cfg
    typed = "data.template" in config.typed(cfg)
    try:
        if chat_template.like_gemmas(str(file), tokenizer):
            return cfg
    except config.UserError as error:
        if typed:
            return cfg
        raise config.UserError(
            f"The base's own chat template cannot be followed. {error}\n"
            "To use Gemma's turns instead: --data.template=gemma"
        ) from None
    spec, own = cfg.data.template, f"--data.template={file}"
    if typed:
        if pathlib.Path(spec) != file:
            runtime.say(
                f"--data.template={spec} was typed and is used; the base was "
                f"taught with another: {own}"
            )
        return cfg
    runtime.say(
        f"the base has a chat template of its own, which is used: {own} "
        "(a <bos> is put before what it writes, if it writes none; for Gemma's "
        "turns type --data.template=gemma)"
    )
    return config.replace(cfg, {"data.template": str(file)})
