"""The `Modelfile` of which Ollama makes a model, from a merged GGUF.

Not from base and adapter: newer versions are reported to refuse `ADAPTER`
lines. Ollama reads no Jinja: its TEMPLATE is in Go's language, and here it is
what our own renderer writes for one question, with Ollama's fields in it.
"""

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import templates
from keras_gemma_ft.data.segments import BOS, END, EOS

# What stands for a text while the template is rendered.
_PROMPT, _SYSTEM = "\ue000prompt\ue000", "\ue000system\ue000"
_FIELDS = {_PROMPT: "{{ .Prompt }}", _SYSTEM: "{{ .System }}"}


def modelfile(source, model):
    """The text of the file.

    Args:
        source: `sources.Source`.
        model: name of the GGUF file beside it.

    Raises:
        UserError: a text of the user's holds three quotes, which end a text
            in a Modelfile.
    """
    data = source.cfg.data
    template = templates.load(data.template)
    plain = _render(template, "")
    told = _render(template, _SYSTEM)
    text = plain
    if told != plain:
        text = f"{{{{ if .System }}}}{told}{{{{ else }}}}{plain}{{{{ end }}}}"
    if template.kind == "gemma":
        text += f"{{{{ .Response }}}}{END}\n"
    lines = [f"FROM ./{model}", f"TEMPLATE {_quoted(text)}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in (END, EOS)]
    if data.system:
        lines.append(f"SYSTEM {_quoted(data.system)}")
    return "\n".join(lines) + "\n"


def _render(template, system):
    segments = templates.prompt(_PROMPT, template, system=system)
    # llama.cpp puts <bos> before the text by itself.
    if segments[0].text == BOS:
        segments = segments[1:]
    text = "".join(segment.text for segment in segments)
    text = text.replace("{{", '{{ "{{" }}')
    for mark, field in _FIELDS.items():
        text = text.replace(mark, field)
    return text


def _quoted(text):
    if '"""' in text:
        raise UserError(
            'ollama: the template or the system text holds """, which would '
            "end it in a Modelfile. Export it as gguf."
        )
    return f'"""{text}"""'
