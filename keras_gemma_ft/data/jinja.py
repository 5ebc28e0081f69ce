"""Chat templates in Jinja, as Hugging Face tokenizers have them, in a sandbox.

The learned parts are what stands in the template's own `{% generation %}`
blocks or, without any, what each assistant's message adds to the prompt that
comes before it.
"""

import datetime
import json
import pathlib

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import segments
from keras_gemma_ft.data.segments import BOS, CONTROL, EOS, Segment
from keras_gemma_ft.data.values import BadRecord


def is_file(spec):
    """Whether `--data.template` names a file that holds a Jinja template."""
    return spec.endswith((".jinja", ".jinja2", ".j2", ".json"))


def read(path):
    """The text of the template in the file `path`.

    Args:
        path: a Jinja file, or a tokenizer_config.json: its `chat_template` is
            a template, or a list of named ones, of which "default" is taken.

    Raises:
        UserError: there is none, or none by that name.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        if not str(path).endswith(".json"):
            return text
        told = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data.template={path}: {error}") from error
    found = told.get("chat_template") if type(told) is dict else None
    if type(found) is list and all(type(one) is dict for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    if type(found) is dict:
        names = ", ".join(map(repr, found))
        found = found.get("default")
        if type(found) is not str:
            raise UserError(
                f"data.template={path}: its chat_template has {names} and no "
                "'default'. Copy the one that you want into a .jinja file and "
                "type its path."
            )
    if type(found) is not str:
        raise UserError(f"data.template={path}: it holds no chat_template.")
    return found


def load(path, tokenizer=None):
    """Compiles the template in a file; UserError if it is missing or broken.

    Args:
        path: see `read`.
        tokenizer: `tokens.Tokenizer`; Gemma's names of tokens without it.
    """
    # Only this kind of template needs jinja2.
    import jinja2

    try:
        return compiled(read(path), tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"data.template={path}, line {error.lineno}: {error.message}"
        ) from error


def compiled(text, tokenizer=None):
    """A template's text, compiled; jinja2.TemplateSyntaxError if broken."""
    environment = _environment()
    if tokenizer:
        environment.control = tokenizer.control
        environment.globals.update(tokenizer.named)
    return environment.from_string(text)


def _environment():
    """What a template may use: the names that Hugging Face's have."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks what is in it, if marks are set."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            self.environment.generates = True
            body = parser.parse_statements(["name:endgeneration"], True)
            call = self.call_method("mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def mark(self, caller):
            first, last = self.environment.marks
            return f"{first}{caller()}{last}"

    # Templates come from strangers; the sandbox keeps them from Python.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.extend(marks=("", ""), generates=False, control=CONTROL)
    environment.globals.update(bos_token=BOS, eos_token=EOS)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    # Jinja's own filter escapes HTML's characters.
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message):
    raise BadRecord(f"the template refuses: {message}")


def _now(form):
    return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def text(found, source, *, ask):
    """What the template writes for turns, as transformers renders it.

    Args:
        found: list of `turns.Turn`.
        source: what `load` returned.
        ask: whether the prompt of an answer follows.

    Raises:
        BadRecord, UserError: see `render`.
    """
    guard = _Guard(found, source)
    return guard.render(found, ask=ask).replace(guard.mark, "")


def prompt(found, source):
    """The turns `found` and the template's generation prompt, as segments."""
    guard = _Guard(found, source)
    text = guard.render(found, ask=True)
    return _with_bos(guard.segments(text, 0.0))


def render(found, source):
    """One conversation -> its segments.

    Args:
        found: list of `turns.Turn`.
        source: what `load` returned.

    Returns:
        List of `Segment`, `<bos>` first.

    Raises:
        BadRecord: the template refuses the conversation.
        UserError: nobody can tell which part is learned.
    """
    if source.environment.generates:
        return _with_bos(_marked(found, source))
    return _with_bos(_appended(found, source))


def _marked(found, source):
    """Learns what stands in the template's generation blocks."""
    guard = _Guard(found, source)
    answers = [turn for turn in found if turn.role == "model"]
    first, last = guard.marks
    source.environment.marks = guard.marks
    try:
        text = guard.render(found, ask=False)
    finally:
        source.environment.marks = ("", "")
    blocks = text.count(first)
    if blocks != len(answers):
        raise UserError(
            f"data.template: it has {blocks} {{% generation %}} blocks for "
            f"{len(answers)} messages of the assistant, expected one for each."
        )
    before, *rest = text.split(first)
    found = guard.segments(before, 0.0)
    for turn, part in zip(answers, rest):
        answer, _, after = part.partition(last)
        found += guard.segments(answer, _weight(turn))
        found += guard.segments(after, 0.0)
    return found


def _weight(turn):
    return turn.learn if turn.text.strip() else 0.0


def _appended(found, source):
    """Learns what each assistant's message adds to the prompt before it."""
    guard = _Guard(found, source)
    told, done = [], ""
    for i, turn in enumerate(found):
        if turn.role != "model":
            continue
        before = guard.render(found[:i], ask=True)
        after = guard.render(found[: i + 1], ask=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                "data.template: what the template writes for the first "
                f"{i + 1} messages does not begin with what it writes for the "
                f"first {i} and the generation prompt, so nobody can tell "
                "which part is learned. It must only ever append, and honour "
                f"add_generation_prompt, or mark the answers with "
                f"{{% generation %}}. Prompt: {before[-80:]!r}, "
                f"whole: {after[len(done) :][:160]!r}"
            )
        answer = after[len(before) :]
        # White space after the end of a turn is nobody's choice.
        body = answer.rstrip() if guard.control.search(answer) else answer
        told += guard.segments(before[len(done) :], 0.0)
        told += guard.segments(body, _weight(turn))
        told += guard.segments(answer[len(body) :], 0.0)
        done = after
    return told


def _with_bos(told):
    if told and told[0] == Segment(BOS, control=True):
        return told
    return [Segment(BOS, control=True), *told]


class _Guard:
    """Tells the template's control tokens from those typed by a user.

    Each control token in a message gets a private-use character inside while
    the template runs; the character is taken out of the segments again.
    """

    def __init__(self, found, source):
        self.source, self.control = source, source.environment.control
        text = "".join(turn.text for turn in found)
        codes = map(chr, range(0xE000, 0xF8FF))
        free = (code for code in codes if code not in text)
        self.mark, *marks = next(free), next(free), next(free)
        self.marks = tuple(marks)

    def render(self, found, *, ask):
        chat = [
            {
                "role": "assistant" if role == "model" else role,
                "content": self.control.sub(self._hide, text),
            }
            for role, text, _ in found
        ]
        try:
            return self.source.render(
                messages=chat,
                add_generation_prompt=ask,
            )
        except BadRecord as error:
            if all(turn.role != "system" for turn in found):
                raise
            raise BadRecord(
                f"{error} (--data.template=gemma puts a system text before "
                "the user's)"
            ) from None
        except Exception as error:  # The template is the user's own program.
            raise UserError(
                f"data.template: {type(error).__name__}: {error}"
            ) from error

    def _hide(self, match):
        return match[0][0] + self.mark + match[0][1:]

    def segments(self, text, learn):
        return [
            segment._replace(text=segment.text.replace(self.mark, ""))
            for segment in segments.split(text, learn, self.control)
        ]
