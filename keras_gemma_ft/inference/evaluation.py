"""How good a model is: held-out loss, exact match, sample answers."""

import math

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.inference import sampling
from keras_gemma_ft.model import sharding

# With --train.exact_match=-1, answers of fewer tokens than this are compared.
_SHORT_ANSWER = 64
_MOST_PROMPTS = 200


class Judge:
    """Scores a model as it is at the moment of asking, always the same way.

    Args:
        cfg: `config.Config`.
        tuner: the `FineTuner`: its model and held-out loss.
        tokenizer: `data.tokens.Tokenizer`.
        held_out: `data.prepared.Prepared` to score on, or None.
        rows: the training rows, whose prompts are answered if held_out is
            None.
        generator: the greedy `sampling.Generator` of another judge of this
            model, whose programs are used again.
    """

    def __init__(
        self, cfg, tuner, tokenizer, held_out, rows=None, generator=None
    ):
        self.tuner, self.tokenizer, self.held_out = tuner, tokenizer, held_out
        self.rows, _ = pipeline.micro_batches(
            cfg.data.batch_size, cfg.data.micro_batch_size
        )
        prompts = (held_out or rows).prompts
        count = cfg.train.exact_match
        if count < 0:
            short = held_out and self._longest(prompts) < _SHORT_ANSWER
            count = _MOST_PROMPTS if short else 0
        self.count, self.samples = count, cfg.train.samples
        self.prompts = prompts[: max(count, self.samples)]
        # Room for the end token, and for an answer that is a little longer.
        longest = self._longest(self.prompts)
        self.limit = min(cfg.generate.max_new_tokens, longest + 8)
        # Greedy, whatever the command asks of its own completions.
        self.generator = generator or sampling.Generator(
            tuner.causal_lm, tokenizer, config.Generate()
        )

    def _longest(self, prompts):
        """Tokens of the longest reference; 0 where there is none."""
        texts = [prompt.reference for prompt in prompts]
        return max(map(len, self.tokenizer.encode_batch(texts)), default=0)

    def batches(self):
        """(held-out batches, how many): what `held_out_loss` takes."""
        batches = pipeline.eval_batches(
            self.held_out, batch_size=self.rows, shard=sharding.shard()
        )
        return batches, pipeline.steps(self.held_out, self.rows)

    def judge(self, when):
        """{"eval_loss", "perplexity", "exact_match", "answers"}.

        Keys that do not apply are absent. Loss in nats a learned token;
        exact match as a share of the prompts answered.
        """
        found = {}
        if self.held_out is not None:
            loss = self.tuner.held_out_loss(*self.batches())
            found["eval_loss"] = loss
            found["perplexity"] = math.exp(min(loss, 700.0))
        rate, answers = exact_match(
            self.generator, self.prompts, limit=self.limit
        )
        if self.count and rate is not None:
            found["exact_match"] = rate
        found["answers"] = answers[: self.samples]
        told = [
            f"{name} {value:.4g}"
            for name, value in found.items()
            if name != "answers"
        ]
        runtime.say(f"{when}: {', '.join(told) or 'sampled'}")
        return found


def exact_match(generator, prompts, *, limit):
    """Answers prompts and compares, white space at the ends aside.

    Args:
        generator: `sampling.Generator`; greedy is what makes sense here.
        prompts: `data.prepared.Prompt`s (prompt_ids, reference).
        limit: longest answer, in tokens.

    Returns:
        (share of prompts answered exactly, the answers as text).
    """
    if not prompts:
        return None, []
    outputs = generator.complete([p.prompt_ids for p in prompts], limit=limit)
    answers = [generator.tokenizer.decode(ids) for ids in outputs]
    right = sum(
        answer.strip() == prompt.reference.strip()
        for answer, prompt in zip(answers, prompts)
    )
    return right / len(prompts), answers
