"""Chat templates for other programs: a `data.template` as Jinja source.

What transformers, vLLM and llama.cpp need to ask a tuned model as it was
taught. They read a template as one text, in which a token that a user spells
is that token; only this package keeps the two apart.
"""

import json
import re

from keras_gemma_ft.data import format_strings, jinja, templates
from keras_gemma_ft.data.segments import BOS, END, EOS, START
from keras_gemma_ft.data.turns import Turn
from keras_gemma_ft.data.values import BadRecord

# Gemma's turns as `templates` writes them. Google's own refuses a system's
# text; here it is put before the user's that follows, with a blank line.
GEMMA = """\
{{- bos_token -}}
{%- set turn = namespace(role='', empty=true) -%}
{%- for message in messages -%}
  {%- if message['role'] in ['assistant', 'model'] -%}
    {%- set role = 'model' -%}
  {%- elif message['role'] in ['user', 'system', 'developer'] -%}
    {%- set role = 'user' -%}
  {%- else -%}
    {{- raise_exception('Gemma has no turns of role ' + message['role']) -}}
  {%- endif -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception('The content of a message must be a text') -}}
  {%- endif -%}
  {%- set text = message['content'] | trim -%}
  {%- if role != turn.role -%}
    {%- if turn.role -%}
      {{- 'END\\n' -}}
    {%- endif -%}
    {{- 'START' + role + '\\n' + text -}}
    {%- set turn.role = role -%}
    {%- set turn.empty = not text -%}
  {%- elif text -%}
    {%- if not turn.empty -%}
      {{- '\\n\\n' -}}
    {%- endif -%}
    {{- text -}}
    {%- set turn.empty = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if turn.role -%}
  {{- 'END\\n' -}}
{%- endif -%}
{%- if add_generation_prompt -%}
  {{- 'STARTmodel\\n' -}}
{%- endif -%}
""".replace("START", START).replace("END", END)

# A system's text that is said where the conversation has none.
_SYSTEM = """\
{%%- set told = namespace(system=false) -%%}
{%%- for message in messages -%%}
  {%%- if message['role'] == 'system' -%%}
    {%%- set told.system = true -%%}
  {%%- endif -%%}
{%%- endfor -%%}
{%%- if not told.system -%%}
  {%%- set messages = [{'role': 'system', 'content': %s}] + messages -%%}
{%%- endif -%%}
"""

# Of a conversation, a format string has places for the last question alone.
_LAST = """\
{%- set last = namespace(system='', question='', answer='', ended=false) -%}
{%- for message in messages -%}
  {%- if message['role'] in ['system', 'developer'] -%}
    {%- set last.system = message['content'] -%}
  {%- elif message['role'] in ['assistant', 'model'] -%}
    {%- set last.answer = message['content'] -%}
    {%- set last.ended = true -%}
  {%- else -%}
    {%- set last.question = message['content'] -%}
    {%- set last.ended = false -%}
  {%- endif -%}
{%- endfor -%}
"""


def of(spec, *, system=""):
    """The Jinja source that asks as `--data.template=spec` does.

    Args:
        spec: "gemma", a format string, or the path of a Jinja template.
        system: a system's text where a conversation has none (data.system).

    Returns:
        str, for `chat_template` of `tokenizer_config.json`. Of a format
        string's it renders the last question (and its answer, if there is
        one), as a format string knows no conversation.

    Raises:
        UserError: see `templates.load`.
    """
    template = templates.load(spec)
    if template.kind == "gemma":
        source = GEMMA
    elif template.kind == "fields":
        source = _of_fields(template.source)
    else:
        source = jinja.read(spec)
    return (
        _SYSTEM % json.dumps(system, ensure_ascii=False) if system else ""
    ) + source


def like_gemmas(path, tokenizer=None):
    """Whether the template in a file writes conversations as Gemma's turns.

    Google's own does: that it refuses a system's text is no difference, and
    neither is white space at the end.

    Args:
        path: see `jinja.read`.
        tokenizer: `tokens.Tokenizer` of the model.

    Raises:
        UserError: it is broken, or cannot be followed.
    """
    theirs = jinja.load(path, tokenizer)
    ours = jinja.compiled(GEMMA, tokenizer)
    for found, ask in _probes():
        want = jinja.text(found, ours, ask=ask)
        try:
            text = jinja.text(found, theirs, ask=ask)
        except BadRecord:
            if any(turn.role == "system" for turn in found):
                continue
            return False
        texts = [t.removeprefix(BOS).rstrip() for t in (want, text)]
        if texts[0] != texts[1]:
            return False
    return True


def _probes():
    """Conversations that tell templates apart, and whether to ask."""
    told = [Turn("system", "Be brief.")]
    asked = [Turn("user", " Two plus two?\n")]
    answered = [*asked, Turn("model", "Four. \n")]
    again = [*answered, Turn("user", "And two?")]
    return [
        (asked, True),
        (answered, False),
        (again, True),
        ([*again, Turn("model", "Six.")], False),
        (told + asked, True),
        (told + answered, False),
    ]


def _of_fields(parts):
    """A format string's parts as Jinja: what it writes for marks, replaced."""
    marks = {"\ue000": "last.question", "\ue001": "last.system"}
    question, system = marks
    plain = _text(format_strings.prompt(question, parts)[1:])
    told = _text(format_strings.prompt(question, parts, system=system)[1:])
    if told.replace(system, "") == plain:
        asked = _written(told, marks)
    else:
        asked = (
            "{%- if last.system -%}\n"
            + _written(told, marks)
            + "{%- else -%}\n"
            + _written(plain, marks)
            + "{%- endif -%}\n"
        )
    _, after = format_strings.around(parts)
    ends = any(part.text in (END, EOS) for part in after if part.control)
    return (
        f"{_LAST}{{{{- bos_token -}}}}\n{asked}"
        + "{%- if last.ended -%}\n{{- last.answer -}}\n"
        + _written(_text(after), marks)
        + ("" if ends else "{{- eos_token -}}\n")
        + "{%- endif -%}\n"
    )


def _text(segments):
    return "".join(segment.text for segment in segments)


def _written(text, marks):
    """Jinja that writes a text in which each mark is an expression."""
    parts = re.split(f"([{''.join(marks)}])", text)
    return "".join(
        f"{{{{- {marks.get(part) or json.dumps(part, ensure_ascii=False)} -}}}}\n"
        for part in parts
        if part
    )
