"""Settings of the records, and of the rows that are made of them."""

import dataclasses
import re

from keras_gemma_ft.config.fields import (
    at_least,
    names,
    setting,
    that,
    understood,
)
from keras_gemma_ft.config.words import roles

_NAMES = names(r"[^,\s][^,]*", "expected names with commas between: name,name.")


@dataclasses.dataclass(frozen=True)
class Data:
    """Data: what is learned from, and how it becomes rows."""

    train: str = setting(
        "demo",
        "training records: 'demo', or path[,path...] with globs "
        "(.jsonl .json .csv .tsv .parquet .txt, or compressed: .jsonl.gz), or "
        "hf://dataset[:split]",
    )
    eval: str = setting(
        "auto",
        "held-out records: like --data.train, or a share of it ('5%'), or "
        "'none'; 'auto' is the demo's own held-out rows, else none",
    )
    format: str = setting(
        "auto",
        "what a record looks like; 'auto' tells from the first records",
        (
            "auto",
            "text",
            "prompt_response",
            "instruction",
            "messages",
            "preference",
        ),
    )
    template: str = setting(
        "gemma",
        "'gemma' (Gemma's turns), a Python format string, or a .jinja file",
    )
    prompt_field: str = setting("", "the records' field that holds the prompt")
    response_field: str = setting(
        "", "the records' field that holds the response"
    )
    system: str = setting(
        "",
        "a system text for every conversation that has none of its own; it "
        "stands before the first user text",
    )
    ignore: str = setting(
        "",
        "fields (name,name) that may be left unread although they look as if "
        "they changed what a record means, such as label, score or tools",
        expect=_NAMES,
    )
    roles: str = setting(
        "",
        "speakers of a conversation by other names: NAME=user,NAME=assistant,"
        "NAME=system,NAME=tool",
        expect=understood(roles),
    )
    text_marks: str = setting(
        "stop",
        "a text record that spells a control token such as <end_of_turn>: "
        "stop the run, parse it as the token, or take it literally as text",
        ("stop", "parse", "literal"),
    )
    learn: str = setting(
        "all",
        "what a text record teaches: all of it, or, with "
        "--data.text_marks=parse, only the model's turns",
        ("all", "answers"),
    )
    columns: str = setting(
        "",
        "names of the columns (name,name) of a CSV that has no header line",
        expect=_NAMES,
    )
    delimiter: str = setting(
        "auto",
        "what separates the cells of a CSV: one character, or tab; 'auto' "
        "tells from the first lines",
        expect=that(
            # A quote or a line's end cannot separate cells.
            re.compile(r"""auto|tab|[^"\r\n]""").fullmatch,
            "expected one character, as in --data.delimiter=';', or tab, or "
            "auto.",
        ),
    )
    sequence_length: int = setting(
        512,
        "tokens in a row",
        expect=that(
            lambda value: value >= 2,
            "a row needs at least 2 tokens. Try --data.sequence_length=512.",
        ),
    )
    batch_size: int = setting(
        8, "rows per optimizer step, all devices", expect=at_least(1)
    )
    micro_batch_size: int = setting(
        0, "rows in memory at once; 0 is batch_size (no accumulation)"
    )
    pack: bool = setting(True, "put several examples into one row")
    buckets: int = setting(
        6,
        "without packing: lengths that batches may have, at most; each is a "
        "compilation of its own; 1 pads every row to the longest",
        expect=at_least(1, " One length for every batch: --data.buckets=1."),
    )
    cache: str = setting(
        "auto",
        "folder that keeps tokenised, packed data; 'auto' is keras_gemma_ft/"
        "data in $XDG_CACHE_HOME or ~/.cache, 'none' keeps nothing",
        expect=that(
            str.strip,
            "it is empty; name a folder, or type --data.cache=none.",
        ),
    )
    bad_rows: int = setting(
        0,
        "how many unusable records may be skipped before stopping",
        expect=at_least(0),
    )

    @property
    def whole_batch(self):
        """The nearest batch_size below that micro_batch_size divides."""
        micro = max(1, self.micro_batch_size)
        return max(1, self.batch_size // micro) * micro
