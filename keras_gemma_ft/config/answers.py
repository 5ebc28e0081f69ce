"""Settings of the completions."""

import dataclasses
import math

from keras_gemma_ft.config.fields import at_least, setting, that


@dataclasses.dataclass(frozen=True)
class Generate:
    """Completions: what is asked, and how words are chosen."""

    prompt: str = setting("", "one prompt; without it, chat at the terminal")
    prompt_file: str = setting(
        "",
        "a text file, one prompt a line, or .jsonl with 'prompt' or "
        "'messages', and 'tools'",
    )
    max_new_tokens: int = setting(
        256, "longest completion, in tokens", expect=at_least(1)
    )
    sampler: str = setting(
        "greedy", "how the next token is chosen", ("greedy", "top_k", "top_p")
    )
    temperature: float = setting(
        1.0,
        "divides the logits before sampling",
        expect=that(
            lambda value: 0 < value < math.inf,
            "expected above 0. For the likeliest word use "
            "--generate.sampler=greedy.",
        ),
    )
    top_k: int = setting(
        40, "words that top_k chooses among", expect=at_least(1)
    )
    top_p: float = setting(
        0.95,
        "probability mass that top_p chooses among",
        expect=that(
            lambda value: 0 < value <= 1, "expected above 0, at most 1."
        ),
    )
    raw: bool = setting(False, "complete the text as it is, without turns")
