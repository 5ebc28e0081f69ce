"""One split of the data -> its tokenised examples, its prompts, its counts."""

import dataclasses
import re
import sys
from typing import NamedTuple

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import layouts, sources, templates, tokens
from keras_gemma_ft.data.prepared import Prompt

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
    layout = layouts.recognise(
        everything,
        format=data.format,
        prompt_field=data.prompt_field,
        response_field=data.response_field,
    )
    template = templates.load(data.template)
    counts, bad = tokens.Report(), list(source.bad)
    built = Built([], [], [], {"split": split, "format": str(layout)})
    rendered = _render(everything, numbers, layout, template, source, bad)
    whole = layout.format == "text"
    for number, segments, example in _encode(rendered, tokenizer, len(numbers)):
        kept = tokens.cut(example, data.sequence_length, counts, windows=whole)
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
        )
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


def _render(records, numbers, layout, template, source, bad):
    """Yields `(record number, segments)`; offenders go to `bad`."""
    for number in numbers.tolist():
        try:
            yield number, templates.render(records[number], layout, template)
        except layouts.BadRecord as error:
            bad.append(f"{source.place(number)}: {error}")


def _encode(rendered, tokenizer, count):
    """Yields `(record number, segments, example)`, in chunks, with a bar."""
    # Only this function shows a bar.
    import tqdm

    bar = tqdm.tqdm(
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
