"""What a run works on: its rows, and its durations in optimizer steps."""

import dataclasses
import datetime

import numpy as np

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import jinja, pipeline, prepared, proof
from keras_gemma_ft.formats import usage
from keras_gemma_ft.model import sharding


@dataclasses.dataclass
class Job:
    """The data of a run, its durations, and what will travel with its result.

    Attributes:
        cfg: `config.Config` of the run.
        tokenizer: `data.tokens.Tokenizer`.
        rows: the training rows.
        held_out: the rows to evaluate on, or None.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the training rows.
        usage: how the tuned model is to be asked.
    """

    cfg: config.Config
    tokenizer: object
    rows: prepared.Prepared
    held_out: object
    steps: int
    steps_per_epoch: int
    usage: usage.Usage

    @classmethod
    def prepare(cls, cfg, loaded, parents=()):
        """Reads and packs the data of `cfg` with `loaded`'s tokenizer.

        Args:
            cfg: `config.Config`.
            loaded: `presets.Loaded`.
            parents: facts of the adapters that the run goes on from.
        """
        rows = pipeline.prepare(cfg.data, loaded.tokenizer, "train", cfg.seed)
        held = pipeline.prepare(cfg.data, loaded.tokenizer, "eval", cfg.seed)
        each = pipeline.steps(rows, cfg.data.batch_size)
        steps = cfg.train.steps or pipeline.steps(
            rows, cfg.data.batch_size, cfg.train.epochs
        )
        parts = {"train": rows, "eval": held}
        parts = {name: part for name, part in parts.items() if part}
        for name, part in parts.items():
            runtime.say(f"{name} data: {_sentence(part)}")
        for note in dict.fromkeys(part.origin.note for part in parts.values()):
            if note:
                runtime.say(note)
        travels = _usage(cfg, loaded, rows.report.get("layout"), parents)
        return cls(cfg, loaded.tokenizer, rows, held, steps, each, travels)

    def duration(self, text):
        """Optimizer steps that a duration such as `25 %` means here."""
        return config.duration(
            text, total=self.steps, steps_per_epoch=self.steps_per_epoch
        )

    @property
    def warmup(self):
        """Optimizer steps of the warm-up."""
        return self.duration(self.cfg.train.warmup)

    def fingerprints(self):
        """{split: name, bytes, sha256 and rows of each source}."""
        parts = {"train": self.rows, "eval": self.held_out}
        return {
            name: part.report["sources"] for name, part in parts.items() if part
        }

    def batches(self, start, count):
        """This process's micro-batches of `count` optimizer steps."""
        return pipeline.train_batches(
            self.rows,
            batch_size=self.cfg.data.batch_size,
            micro_batch_size=self.cfg.data.micro_batch_size,
            seed=self.cfg.seed,
            start_step=start,
            steps=count,
            shard=sharding.shard(),
        )

    def show_proof(self):
        """Shows what of the first batch is learned."""
        batch = next(iter(self.batches(0, 1)))
        runtime.say("the first batch, learned tokens in ⟦ ⟧:")
        runtime.say(proof.proof(batch, self.tokenizer))

    def token_counter(self):
        """Function of a step: (row tokens, learned tokens) before it."""
        lengths, learned = self.rows.lengths, self.rows.learned
        seen = np.zeros((self.steps + 1, 2), "int64")
        for step in range(self.steps):
            rows = pipeline.rows_of_step(
                self.rows,
                step,
                batch_size=self.cfg.data.batch_size,
                micro_batch_size=self.cfg.data.micro_batch_size,
                seed=self.cfg.seed,
            )
            here = lengths[rows].sum(), learned[rows].sum()
            seen[step + 1] = seen[step] + here
        return lambda step: (int(seen[step][0]), int(seen[step][1]))


def _usage(cfg, loaded, layout, parents):
    """`usage.Usage` of what the run makes.

    Args:
        cfg, loaded, parents: as of `Job.prepare`.
        layout: {"format", "fields"} as which the records were read, or None.
    """
    lora, spec = cfg.lora, cfg.data.template
    return usage.describe(
        cfg,
        jinja=jinja.read(spec) if jinja.is_file(spec) else "",
        base={
            "preset": cfg.preset,
            "sha256": loaded.fingerprint,
            "dtype": loaded.causal_lm.backbone.dtype_policy.name,
        },
        trained={
            "layout": layout,
            "quantize": cfg.model.quantize,
            "quantize_embedding": cfg.model.quantize_embedding,
            "lora": lora.rank
            and {
                "style": lora.style,
                "rank": lora.rank,
                "alpha": lora.alpha or float(lora.rank),
                "rslora": lora.rslora,
                "init": lora.init,
                "targets": list(config.targets(lora)),
            },
        },
        when=datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        parents=parents,
    )


def _sentence(part):
    """One line about a prepared split."""
    report, origin = part.report, part.origin
    dropped = ", ".join(f"{n} x {why}" for why, n in report["dropped"].items())
    notes = [f"{n} {what}" for what, n in report["turns"].items()]
    if report["weighted"]:
        notes.append(f"{report['weighted']} records of another weight than 1")
    if report["typed"]:
        notes.append(
            f"{report['typed']} records spell a control token, which stays text"
        )
    return (
        f"{report['records']} records ({report['format']}), "
        f"{report['tokens']:,} tokens, {report['learned_tokens']:,} learned, "
        f"{report['rows']} rows of {', '.join(map(str, part.buckets))} places, "
        f"{report['padding']:.1%} padding, "
        f"{report['truncated']} truncated, dropped: {dropped or 'none'}; "
        f"{''.join(f'{note}; ' for note in notes)}"
        f"{'from the cache' if origin.cached else 'prepared'} "
        f"in {origin.seconds:.2f} s"
    )
