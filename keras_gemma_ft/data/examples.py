"""One split of the data -> its tokenised examples, its prompts, its counts."""

import collections
import dataclasses
import re
import sys
from typing import NamedTuple

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import layouts, sources, templates, tokens
from keras_gemma_ft.data.prepared import Prompt
from keras_gemma_ft.data.values import BadRecord, NeedsChoice

# Records rendered and tokenised at once: enough to keep every core busy.
CHUNK = 1024
SHOW_PROGRESS = 2000


class Built(NamedTuple):
    """E examples of at most sequence_length + 1 ids, in the records' order.

    Attributes:
        examples: list of `tokens.Example`.
        records: list of E record numbers, from 0 over all records read.
        prompts: list of `prepared.Prompt`, one per kept record; empty for
            `text`.
        report: dict: split, format, sources, skipped and `tokens.Report`.
    """

    examples: list
    records: list
    prompts: list
    report: dict


def build(found, data, tokenizer, split, seed):
    """Reads, renders, tokenises and cuts one split.

    Args:
        found: what `sources.find` made of `spec(data, split)`.
        data: `config.Data`.
        tokenizer: `tokens.Tokenizer`.
        split: "train" or "eval".
        seed: decides a held-out share.

    Returns:
        `Built`.

    Raises:
        UserError: see `sources.read`, `layouts.recognise`, `templates.load`;
            or nothing is left to learn.
    """
    everything, source, numbers = _read(found, data, split, seed)
    layout = _layout(everything, data, source)
    template = templates.load(data.template, tokenizer)
    _stop_if_passed_over(everything, numbers, layout, template, source)
    counts, bad = tokens.Report(), list(source.bad)
    built = Built([], [], [], {"split": split, "format": str(layout)})
    built.report["layout"] = {"format": layout.format, "fields": layout.fields}
    told = collections.Counter()
    rendered = _render(everything, numbers, layout, template, source, bad, told)
    # Rows of text are windows of it; of a conversation the end is cut off.
    whole = layout.format == "text" and layout.learn == "all"
    longest = 0
    for number, segments, example in _encode(rendered, tokenizer, len(numbers)):
        _count(segments, counts, tokenizer.control)
        kept = tokens.cut(example, data.sequence_length, counts, windows=whole)
        longest = max(longest, len(example.token_ids))
        built.examples.extend(kept)
        built.records.extend([number] * len(kept))
        if kept and not whole:
            ids = example.token_ids[: example.answer]
            built.prompts.append(Prompt(ids, _reference(segments)))
    sources.stop_if_bad(bad, data.bad_rows)
    if not built.examples:
        reasons = [f"{n} x {why}" for why, n in counts.dropped.items()]
        raise UserError(
            f"{split}: of {len(numbers)} records none is left to learn: "
            f"{'; '.join(reasons) or 'all were skipped'}. Read as {layout}, "
            f"--data.sequence_length={data.sequence_length}."
            + _longer(counts, longest)
        )
    counts.turns = {what: n for what, n in told.items() if n}
    built.report.update(
        sources=list(source.files), skipped=bad, **dataclasses.asdict(counts)
    )
    return built


def share(data):
    """Percent of the training records that are held out; None is no share."""
    match = re.fullmatch(r"\s*([\d.]+)\s*%\s*", data.eval)
    return float(match[1]) if match else None


def spec(data, split):
    """What `sources.find` is given for a split; None: nothing to evaluate on.

    A share such as `5%` of the training records is read from them.
    """
    if split == "train" or share(data) is not None:
        return data.train
    if data.eval == "auto":
        return "demo:eval" if data.train in sources.DEMO else None
    return None if data.eval in ("none", "") else data.eval


def _read(found, data, split, seed):
    """`(records, report, numbers of the split)`."""
    records, report = sources.read(found, bad_rows=data.bad_rows)
    numbers = np.arange(len(records))
    percent = share(data)
    if percent is not None:
        held = round(len(records) * percent / 100)
        if not 0 < held < len(records):
            raise UserError(
                f"data.eval={data.eval!r} of {len(records)} records would "
                f"hold {held} out. Name a share that leaves some for both."
            )
        order = np.random.default_rng([seed, 1]).permutation(len(records))
        numbers = order[:held] if split == "eval" else order[held:]
    return records, report, np.sort(numbers)


def _longer(counts, longest):
    """What to type where every answer begins too late; "" elsewhere."""
    if not counts.dropped.get(tokens.TOO_LONG):
        return ""
    return (
        f" The longest has {longest} tokens: try "
        f"--data.sequence_length={-(-longest // 64) * 64}, if that fits."
    )


def _layout(records, data, source):
    """`layouts.recognise`, and of a CSV the flag that names its columns."""
    try:
        return layouts.recognise(records, data)
    except UserError as error:
        name = source.files[0]["name"]
        if data.columns or not re.search(r"\.[ct]sv(\.\w+)?$", name):
            raise
        count = max(2, len(records[0]))
        known = ["prompt", "response", *map("column_{}".format, range(3, 99))]
        raise UserError(
            f"{error}\nHas {name} no header line? Then name its {count} "
            f"columns: --data.columns={','.join(known[:count])}"
        ) from None


def _stop_if_passed_over(records, numbers, layout, template, source):
    """Refuses fields that say what a record is worth and that nothing reads.

    Raises:
        UserError: all such fields, how many records have each, the first one.
    """
    named = templates.read_by(template)
    found = {}
    for number in numbers.tolist():
        told = layouts.passed_over(records[number], layout, named)
        for field, value in told.items():
            first, count = found.get(field, ((number, value), 0))
            found[field] = first, count + 1
    if not found:
        return
    lines = [
        f"  {field}: {count} of {len(numbers)} records, first "
        f"{source.place(number)}: {str(value)[:60]!r}"
        for field, ((number, value), count) in found.items()
    ]
    names = ",".join(found)
    first = next(iter(found))
    raise UserError(
        "These fields can change what a record means, and nothing reads them "
        f"({layout}):\n" + "\n".join(lines) + "\n"
        "A label or a score may say that an answer is a bad one, and tools or "
        "images are a part of what was asked. To learn the records as if the "
        f"fields were not there: --data.ignore={names}\n"
        f"To learn such a field as the answer: --data.response_field={first} "
        "(with --data.prompt_field=...). To count records differently, name "
        "the field weight (0 is not learned). Else leave the records out."
    )


def _count(segments, counts, control):
    """Adds what one record's segments tell to a `tokens.Report`."""
    counts.typed += any(
        control.search(segment.text)
        for segment in segments
        if not segment.control
    )
    counts.weighted += any(segment.learn not in (0, 1) for segment in segments)


def _render(records, numbers, layout, template, source, bad, told):
    """Yields `(record number, segments)`; offenders go to `bad`."""
    for number in numbers.tolist():
        try:
            yield (
                number,
                templates.render(records[number], layout, template, told),
            )
        except NeedsChoice as error:
            raise UserError(f"{source.place(number)}: {error}") from None
        except BadRecord as error:
            bad.append(f"{source.place(number)}: {error}")


def _encode(rendered, tokenizer, count):
    """Yields `(record number, segments, example)`, in chunks, with a bar."""
    # Only this function shows a bar.
    from tqdm import auto

    bar = auto.tqdm(
        total=count,
        desc="tokenise",
        unit=" records",
        file=sys.stderr,
        disable=count < SHOW_PROGRESS,
    )
    with bar:
        rendered = iter(rendered)
        while chunk := [pair for _, pair in zip(range(CHUNK), rendered)]:
            examples = tokens.encode([s for _, s in chunk], tokenizer)
            for (number, segments), example in zip(chunk, examples):
                yield number, segments, example
            bar.update(len(chunk))


def _reference(segments):
    """The text of the last learned run."""
    last = max(i for i, segment in enumerate(segments) if segment.learn)
    while last >= 0 and segments[last].learn:
        last -= 1
    return "".join(
        segment.text
        for segment in segments[last + 1 :]
        if segment.learn and not segment.control
    )
