"""The prompts, with their answers, on which an export is compared."""

import dataclasses
from typing import NamedTuple

import numpy as np

from keras_gemma_ft import config
from keras_gemma_ft.data import pipeline

# Tokens of a probe at most: more would cost memory and prove no more.
_LONGEST = 160


class Probes(NamedTuple):
    """Sequences of token ids, `<bos>` first.

    Attributes:
        sequences: lists of ids: a prompt and its answer.
        answers: for each, the index of the first token of the answer.
        origin: what they are, in words.
    """

    sequences: list
    answers: list
    origin: str


def choose(cfg, tokenizer):
    """`Probes` of the run's held-out records, or else of the demo's.

    Args:
        cfg: `config.Config`; its data section, seed and export.probes count.
        tokenizer: `data.tokens.Tokenizer`.
    """
    count = cfg.export.probes
    try:
        prompts = _prompts(cfg.data, tokenizer, cfg.seed)
        origin = f"held-out prompts of {cfg.data.eval}"
        if cfg.data.eval == "auto":
            origin = "held-out prompts of the demo"
    except config.UserError:
        # The records of a run may be gone, or on another machine.
        prompts = ()
    if not prompts:
        data = dataclasses.replace(
            config.Data(), sequence_length=512, template=cfg.data.template
        )
        try:
            prompts = _prompts(data, tokenizer, cfg.seed)
        except config.UserError:
            # A template that the demo's records do not fit.
            data = dataclasses.replace(data, template="gemma")
            prompts = _prompts(data, tokenizer, cfg.seed)
        origin = "prompts of the demo"
    chosen = prompts[:count]
    sequences, answers = [], []
    for prompt in chosen:
        ids = [*map(int, prompt.prompt_ids)]
        answers.append(len(ids))
        ids += [*tokenizer.encode(prompt.reference), tokenizer.end_of_turn]
        sequences.append(ids[:_LONGEST])
    return Probes(sequences, answers, f"{len(chosen)} {origin}")


def _prompts(data, tokenizer, seed):
    held = pipeline.prepare(data, tokenizer, "eval", seed)
    return held.prompts if held else ()


def loss(logits, probes):
    """Mean loss of the answers' tokens in nats; None where none is compared.

    Args:
        logits: arrays [T', V] of the last tokens of each sequence.
        probes: `Probes`.
    """
    total, count = 0.0, 0
    for scores, ids, answer in zip(logits, probes.sequences, probes.answers):
        first = len(ids) - len(scores)
        for at in range(max(answer, first + 1), len(ids)):
            row = scores[at - 1 - first].astype("float64")
            total += np.logaddexp.reduce(row) - row[ids[at]]
            count += 1
    return total / count if count else None
