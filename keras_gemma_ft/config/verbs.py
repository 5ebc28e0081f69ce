"""Which settings each verb reads, and which of them matter first."""

from typing import NamedTuple


class Verb(NamedTuple):
    """What `--help` of a verb shows.

    Args:
        first: paths of the dozen settings that most people need.
        more: paths of other settings that the verb reads, or sections.
    """

    first: tuple
    more: tuple

    def reads(self, path):
        """Whether the verb reads the setting with this path."""
        return not {path, path.partition(".")[0]}.isdisjoint(
            self.first + self.more
        )


VERBS = {
    "train": Verb(
        first=(
            "preset",
            "data.train",
            "data.eval",
            "run_dir",
            "backend",
            "lora.rank",
            "train.learning_rate",
            "train.epochs",
            "train.steps",
            "data.batch_size",
            "data.sequence_length",
            "model.quantize",
        ),
        more=(
            "seed",
            "resume",
            "mesh",
            "adapter",
            "data",
            "lora",
            "train",
            "model",
            "hosts",
            "generate.max_new_tokens",
        ),
    ),
    "evaluate": Verb(
        first=(
            "preset",
            "adapter",
            "data.eval",
            "data.format",
            "data.template",
            "backend",
            "data.batch_size",
            "data.sequence_length",
            "train.exact_match",
            "generate.max_new_tokens",
            "model.dtype",
            "model.quantize",
        ),
        more=(
            "seed",
            "mesh",
            "data",
            "train.loss_chunk",
            "train.samples",
            "model.quantize_embedding",
            "model.quantize_cache",
            "hosts",
        ),
    ),
    "generate": Verb(
        first=(
            "preset",
            "adapter",
            "generate.prompt",
            "generate.prompt_file",
            "generate.max_new_tokens",
            "generate.sampler",
            "generate.temperature",
            "data.system",
            "data.template",
            "backend",
            "model.dtype",
            "model.quantize",
        ),
        more=(
            "seed",
            "mesh",
            "generate",
            "data.roles",
            "model.quantize_embedding",
            "model.quantize_cache",
            "hosts",
        ),
    ),
    "export": Verb(
        first=(
            "run_dir",
            "adapter",
            "export.format",
            "export.to",
            "export.dtype",
            "export.quantize",
            "export.max_shard_size",
            "export.verify",
            "export.weights",
            "export.rank",
            "export.push_to",
            "preset",
        ),
        more=("backend", "seed", "export", "data"),
    ),
    "serve": Verb(
        first=(
            "preset",
            "adapter",
            "serve.port",
            "serve.host",
            "serve.context",
            "serve.queue",
            "generate.max_new_tokens",
            "generate.sampler",
            "data.system",
            "backend",
            "model.dtype",
            "model.quantize",
        ),
        more=(
            "seed",
            "mesh",
            "generate.temperature",
            "generate.top_k",
            "generate.top_p",
            "data.template",
            "data.roles",
            "model.quantize_embedding",
            "model.quantize_cache",
            "hosts",
        ),
    ),
    "plan": Verb(
        first=(
            "preset",
            "device",
            "search",
            "compile",
            "adapter",
            "mesh",
            "data.batch_size",
            "data.micro_batch_size",
            "data.sequence_length",
            "lora.rank",
            "model.quantize",
            "model.remat",
        ),
        more=(
            "backend",
            "seed",
            "lora",
            "model.dtype",
            "model.quantize_embedding",
            "model.scan",
            "model.compile",
            "train.steps",
            "train.learning_rate",
            "train.schedule",
            "train.optimizer",
            "train.weight_decay",
            "train.clip_norm",
            "train.loss_chunk",
        ),
    ),
}
