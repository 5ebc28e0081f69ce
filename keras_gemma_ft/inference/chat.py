"""Prompts and conversations in Gemma's turns, answered as text."""

import re
import sys

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import templates, tokens, turns
from keras_gemma_ft.inference import sampling, switching, taught
from keras_gemma_ft.model import hosts


def load(cfg):
    """A `Session` of `cfg`'s preset, with `cfg.adapter` if it is given.

    What travels with an adapter is used where `cfg` does not say otherwise.
    """
    hosts.start(cfg)
    with hosts.agreed():
        if switching.several(cfg.adapter):
            return of_several(switching.load(cfg), cfg)
        cfg, loaded = taught.load(cfg)
    return Session(loaded, cfg)


def of_several(loaded, cfg, *, few=False):
    """A `Session` of `switching.Loaded`; `few` as of `sampling.Generator`."""
    first, *_ = loaded.ways
    session = Session(loaded.model, cfg, several=loaded, few=few)
    session.use(first)
    return session


class Session:
    """A model that answers.

    Args:
        loaded: `presets.Loaded`.
        cfg: `config.Config`; its generate section, data.template,
            data.system and data.roles count.
        several: `switching.Loaded`, where adapters take turns.
        few: as of `sampling.Generator`.
    """

    def __init__(self, loaded, cfg, *, several=None, few=False):
        self.tokenizer, self.settings = loaded.tokenizer, cfg.generate
        self.several = several
        self._speak(cfg)
        self.generator = sampling.Generator(
            loaded.causal_lm,
            loaded.tokenizer,
            cfg.generate,
            seed=cfg.seed,
            few=few,
        )

    def _speak(self, cfg):
        """Prompts are written as `cfg` has it from now on."""
        self.template = templates.load(cfg.data.template, self.tokenizer)
        self.system = cfg.data.system
        self.roles = turns.speakers(cfg.data.roles)

    def use(self, name, say=None):
        """Answers as this adapter does, asked as it was taught.

        Args:
            name: of `several.ways`, so the base's too.
            say: as of `switching.Adapters.use`.
        """
        self._speak(self.several.ways[name])
        self.several.adapters.use(name, say)

    def ids(self, question, *, raw=False):
        """Token ids of a prompt.

        Args:
            question: a str, messages, or a dict of messages and tools.
            raw: whether a str is completed as it is, without turns; so it is
                with `generate.raw`, too.

        Raises:
            config.UserError: as of `templates.prompt`.
        """
        if (raw or self.settings.raw) and isinstance(question, str):
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
        """[{"prompt", "completion"}] of prompts; a single one is streamed.

        Of several adapters each answers all of them, and "adapter" tells
        which.
        """
        if self.several is None:
            return self._answers(prompts)
        found = []
        for name in self.several.adapters.names:
            self.use(name, runtime.say)
            found += [
                {**said, "adapter": name} for said in self._answers(prompts)
            ]
        return found

    def _answers(self, prompts):
        shown = len(prompts) == 1 and hosts.first()
        stream = _Stream(self.tokenizer) if shown else None
        outputs = self.generator.complete(
            [self.ids(p) for p in prompts], on_token=stream
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
        if self.several:
            self._command("")
        messages, said = [], []
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            text = lines.readline().strip()
            if not text:
                return said
            if self.several and re.match(r"/adapter\b", text):
                self._command(text.removeprefix("/adapter").strip())
                continue
            messages.append({"role": "user", "content": text})
            question = text if self.settings.raw else messages
            stream = _Stream(self.tokenizer)
            ids = self.generator.complete(
                [self.ids(question)], on_token=stream
            )[0]
            stream.end()
            answer = self.tokenizer.decode(ids)
            messages.append({"role": "model", "content": answer})
            said.append({"prompt": text, "completion": answer})
            if self.several:
                said[-1]["adapter"] = self.several.adapters.now

    def _command(self, name):
        """`/adapter NAME` of a chat: who goes on with the conversation."""
        if name in self.several.ways:
            return self.use(name, runtime.say)
        runtime.say(
            f"adapter: {self.several.adapters.now} answers; /adapter NAME "
            f"asks another of {', '.join(self.several.ways)}"
        )


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
