"""Prompts -> completions: batched, streamed, stopped at either end token.

KerasHub's own `generate` stops at `<eos>` alone, cannot stream, and compiles a
program for every length. Here lengths are rounded up, so few are compiled.
"""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma_ft.model import forward, hosts

# Prompts and caches are padded to multiples of this many tokens.
_BUCKET = 64


def compiled(model, function):
    """`function(*tensors)` of the model's variables, compiled by the backend.

    JAX: `jit` with the variables as arguments, so that new values need no new
    program. TensorFlow: `tf.function`. Torch: no gradients.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        variables = model.variables

        @jax.jit
        def run(values, *args):
            pairs = list(zip(variables, values))
            with keras.StatelessScope(state_mapping=pairs):
                return function(*args)

        return lambda *args: run([v.value for v in variables], *args)
    if backend == "torch":
        import torch

        return torch.no_grad()(function)
    import tensorflow as tf

    # AutoGraph would read our source for 6 s, to find no Python to convert.
    return tf.function(function, autograph=False)


class Generator:
    """Completes prompts with one model; keeps its compiled programs.

    Args:
        causal_lm: `GemmaCausalLM`, with or without LoRA.
        tokenizer: `data.tokens.Tokenizer`.
        settings: `config.Generate`.
        seed: of the samplers.
        few: whether lengths are powers of two, so that prompts of all lengths
            share a few programs; else multiples of `_BUCKET`.
    """

    def __init__(self, causal_lm, tokenizer, settings, *, seed=0, few=False):
        self.backbone = causal_lm.backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.stops = tokenizer.stops
        self.choose = chooser(settings, seed)
        self.few = few
        self._advance = compiled(self.backbone, self._next_logits)

    def _next_logits(self, ids, segments, positions, cache):
        """Next-word logits [B, V], their argmax [B], and the cache."""
        hidden, cache = forward.hidden_states(
            self.backbone, ids, segments, positions, cache=cache
        )
        scores = forward.logits(self.backbone, hidden[:, -1])
        # A table may have more rows than the vocabulary has pieces.
        scores = scores[:, : self.tokenizer.vocabulary_size]
        return scores, ops.argmax(scores, axis=-1), cache

    def complete(
        self,
        prompts,
        *,
        batch_size=32,
        on_token=None,
        limit=None,
        choose=None,
    ):
        """Completions of `prompts`.

        Args:
            prompts: lists of token ids.
            batch_size: rows at once.
            on_token: called with (prompt number, id) as a token is chosen;
                the prompt's completion ends where it returns True.
            limit: longest completion; the settings' by default.
            choose: a function of `chooser`; that of the settings by default.

        Returns:
            Lists of token ids, without the end token.
        """
        limit = limit or self.settings.max_new_tokens
        choose = choose or self.choose
        # Like lengths together: a batch is as slow as its longest row.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        outputs = [None] * len(prompts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tell = on_token and (lambda i, id: on_token(rows[i], id))
            batch = [prompts[i] for i in rows]
            completions = self._batch(batch, limit, tell, choose)
            for i, completion in zip(rows, completions):
                outputs[i] = completion
        return outputs

    def _batch(self, prompts, limit, on_token, choose):
        width, slots = self._room(max(map(len, prompts)), limit)
        rows = len(prompts)
        ids = np.zeros((rows, width), "int32")
        segments, positions = np.zeros_like(ids), np.zeros_like(ids)
        # Padding on the left, so that every row writes to the same slot.
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = prompt
            segments[i, width - len(prompt) :] = 1
            positions[i, width - len(prompt) :] = np.arange(len(prompt))
        cache = forward.new_cache(self.backbone, rows, slots)
        completions = [[] for _ in prompts]
        active = set(range(rows))
        position = positions[:, -1:]
        for step in range(limit):
            scores, best, cache = self._advance(
                ops.convert_to_tensor(ids),
                ops.convert_to_tensor(segments),
                ops.convert_to_tensor(positions),
                cache,
            )
            chosen = hosts.whole(choose(scores, best))
            for i in sorted(active):
                token = int(chosen[i])
                if token in self.stops:
                    active.discard(i)
                    continue
                completions[i].append(token)
                if on_token and on_token(i, token):
                    active.discard(i)
            if not active:
                break
            ids = chosen.astype("int32")[:, None]
            segments = np.ones_like(ids)
            positions = position + step + 1
        return completions

    def _room(self, longest, limit):
        """(columns of the prompts, slots of the cache) for these lengths."""
        if self.few:
            width = _doubled(longest)
            # A short limit takes the program of the settings' own.
            limit = max(limit, self.settings.max_new_tokens)
            return width, _doubled(width + limit)
        width = _round_up(longest)
        return width, width + _round_up(limit)


def chooser(settings, seed):
    """How the next words are chosen: a function, by one of KerasHub's samplers.

    It is no part of a compiled program: other settings compile nothing.

    Args:
        settings: `config.Generate`: sampler, temperature, top_k and top_p.
        seed: of the sampler.

    Returns:
        Function of float32 scores [B, V] and their argmax [B] that returns
        ids [B].
    """
    if settings.sampler == "greedy":
        return lambda scores, best: best
    if settings.sampler == "top_k":
        sampler = keras_hub.samplers.TopKSampler(k=settings.top_k, seed=seed)
    else:
        sampler = keras_hub.samplers.TopPSampler(p=settings.top_p, seed=seed)

    def choose(scores, best):
        scaled = scores / settings.temperature
        return sampler.get_next_token(ops.softmax(scaled, axis=-1))

    return choose


def _round_up(n):
    return -(-n // _BUCKET) * _BUCKET


def _doubled(n):
    """The least power of two from n on, at least `_BUCKET`."""
    return max(_BUCKET, 1 << (n - 1).bit_length())
