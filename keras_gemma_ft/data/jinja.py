"""Chat templates in Jinja, as Hugging Face tokenizers have them, in a sandbox.

The learned parts are found by rendering every prefix of the conversation.
"""

import pathlib

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import layouts
from keras_gemma_ft.data.segments import BOS, CONTROL, EOS, Segment


def load(path):
    """Compiles the file `path`; UserError if it is missing or broken."""
    # Only this kind of template needs jinja2.
    import jinja2
    import jinja2.sandbox

    def raise_exception(message):
        raise layouts.BadRecord(f"the template refuses: {message}")

    # Templates come from strangers; the sandbox keeps them from Python.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        source = pathlib.Path(path).read_text(encoding="utf-8")
        return environment.from_string(source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={path}: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"data.template={path}, line {error.lineno}: {error.message}"
        ) from error


def prompt(found, source):
    """The turns `found` and the template's generation prompt, as segments."""
    guard = _Guard(found)
    text = guard.render(source, found, ask=True)
    return _with_bos(guard.segments(text, False))


def render(found, source):
    """Learns what each assistant's message adds to the prompt before it.

    Args:
        found: list of `layouts.Turn`.
        source: what `load` returned.

    Returns:
        List of `Segment`, `<bos>` first.

    Raises:
        UserError: the template does more than append, so that nobody can tell
            which part is learned.
    """
    guard = _Guard(found)
    segments, done = [], ""
    for i, turn in enumerate(found):
        if turn.role != "model":
            continue
        before = guard.render(source, found[:i], ask=True)
        after = guard.render(source, found[: i + 1], ask=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                "data.template: what the template writes for the first "
                f"{i + 1} messages does not begin with what it writes for the "
                f"first {i} and the generation prompt, so nobody can tell "
                "which part is learned. It must only ever append, and honour "
                f"add_generation_prompt. Prompt: {before[-80:]!r}, "
                f"whole: {after[len(done) :][:160]!r}"
            )
        answer = after[len(before) :]
        # White space after the end of a turn is nobody's choice.
        body = answer.rstrip() if CONTROL.search(answer) else answer
        segments += guard.segments(before[len(done) :], False)
        segments += guard.segments(body, bool(turn.text.strip()))
        segments += guard.segments(answer[len(body) :], False)
        done = after
    return _with_bos(segments)


def _with_bos(segments):
    if segments and segments[0] == Segment(BOS, control=True):
        return segments
    return [Segment(BOS, control=True), *segments]


class _Guard:
    """Tells the template's control tokens from those typed by a user.

    Each control token in a message gets a private-use character inside while
    the template runs; the character is taken out of the segments again.
    """

    def __init__(self, found):
        text = "".join(turn.text for turn in found)
        codes = map(chr, range(0xE000, 0xF8FF))
        self.mark = next(code for code in codes if code not in text)

    def render(self, source, found, *, ask):
        chat = [
            {
                "role": "assistant" if role == "model" else role,
                "content": CONTROL.sub(self._hide, text),
            }
            for role, text in found
        ]
        try:
            return source.render(
                messages=chat,
                add_generation_prompt=ask,
                bos_token=BOS,
                eos_token=EOS,
            )
        except layouts.BadRecord:
            raise
        except Exception as error:  # The template is the user's own program.
            raise UserError(
                f"data.template: {type(error).__name__}: {error}"
            ) from error

    def _hide(self, match):
        return match[0][0] + self.mark + match[0][1:]

    def segments(self, text, learn):
        found, start = [], 0
        for match in CONTROL.finditer(text):
            found.append(Segment(text[start : match.start()], learn))
            found.append(Segment(match[0], learn, control=True))
            start = match.end()
        found.append(Segment(text[start:], learn))
        return [
            segment._replace(text=segment.text.replace(self.mark, ""))
            for segment in found
            if segment.text
        ]
