"""Prompts and conversations in Gemma's turns, answered as text."""

import sys

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import templates, tokens, turns
from keras_gemma_ft.inference import sampling, taught
from keras_gemma_ft.model import hosts


def load(cfg):
    """A `Session` of `cfg`'s preset, with `cfg.adapter` if it is given.

    What travels with the adapter is used where `cfg` does not say otherwise.
    """
    hosts.start(cfg)
    with hosts.agreed():
        cfg, loaded = taught.load(cfg)
    return Session(loaded, cfg)


class Session:
    """A model that answers.

    Args:
        loaded: `presets.Loaded`.
        cfg: `config.Config`; its generate section, data.template,
            data.system and data.roles count.
    """

    def __init__(self, loaded, cfg):
        self.tokenizer, self.settings = loaded.tokenizer, cfg.generate
        self.template = templates.load(cfg.data.template, loaded.tokenizer)
        self.system = cfg.data.system
        self.roles = turns.speakers(cfg.data.roles)
        self.generator = sampling.Generator(
            loaded.causal_lm, loaded.tokenizer, cfg.generate, seed=cfg.seed
        )

    def _ids(self, question):
        """Token ids of a prompt: a str, messages, or those with tools."""
        if self.settings.raw and isinstance(question, str):
            return [self.tokenizer.bos, *self.tokenizer.encode(question)]
        tools = None
        if isinstance(question, dict):
            question, tools = question["messages"], question["tools"]
        segments = templates.prompt(
            question,
            self.template,
            system=self.system,
            offered=tools,
            roles=self.roles,
        )
        return tokens.encode([segments], self.tokenizer)[0].token_ids

    def answer(self, prompts):
        """[{"prompt", "completion"}] of prompts; a single one is streamed."""
        shown = len(prompts) == 1 and hosts.first()
        stream = _Stream(self.tokenizer) if shown else None
        outputs = self.generator.complete(
            [self._ids(p) for p in prompts], on_token=stream
        )
        if stream:
            stream.end()
        return [
            {"prompt": p, "completion": self.tokenizer.decode(ids)}
            for p, ids in zip(prompts, outputs)
        ]

    def talk(self, lines):
        """A chat: reads user turns from `lines` until they end.

        Returns:
            [{"prompt", "completion"}] of all turns.
        """
        if hosts.many():
            raise config.UserError(
                "a chat needs one terminal, not --hosts: give every process "
                "--generate.prompt=... or --generate.prompt_file=FILE."
            )
        runtime.say("chat: type a message; an empty line or Ctrl-D ends it")
        messages, said = [], []
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            text = lines.readline().strip()
            if not text:
                return said
            messages.append({"role": "user", "content": text})
            question = text if self.settings.raw else messages
            stream = _Stream(self.tokenizer)
            ids = self.generator.complete(
                [self._ids(question)], on_token=stream
            )[0]
            stream.end()
            answer = self.tokenizer.decode(ids)
            messages.append({"role": "model", "content": answer})
            said.append({"prompt": text, "completion": answer})


class _Stream:
    """Prints text as tokens come; waits for the rest of a split character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, row, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            print(text[self.shown :], end="", file=sys.stderr, flush=True)
            self.shown = len(text)

    def end(self):
        """Prints what is left: a character that was never completed."""
        text = self.tokenizer.decode(self.ids)
        print(text[self.shown :], file=sys.stderr, flush=True)
