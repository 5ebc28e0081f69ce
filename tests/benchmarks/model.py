"""A Gemma 2 of random weights, the same for everybody, and its FLOPs."""

import dataclasses
import json
import pathlib

import numpy as np

from keras_gemma_ft import config, embedded
from keras_gemma_ft.formats import huggingface, names

FIELDS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffw", "words")
# Large enough that a step is matmuls, small enough for two CPU cores.
SMALL = (8, 512, 8, 4, 64, 2048, 32768)
PRESETS = {
    "2b": (26, 2304, 8, 4, 256, 9216, 256_000),
    "9b": (42, 3584, 16, 8, 256, 14336, 256_000),
}


def add_flags(parser, shapes):
    """The flags that every benchmark of training has.

    Args:
        parser: `argparse.ArgumentParser`.
        shapes: the defaults of FIELDS.
    """
    add = parser.add_argument
    add("--backend", default="jax", help="jax,tensorflow,torch")
    for name, value in zip(FIELDS, shapes):
        add(f"--{name}", type=int, default=value)
    add("--window", type=int, default=4096)
    add("--rank", type=int, default=8)
    add("--targets", default="all-linear", help="as --lora.targets")
    kinds = ("float32", "bfloat16", "float16")
    add("--dtype", default="float32", choices=kinds)
    add("--seed", type=int, default=0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of a Gemma 2; ffw is the width of gate and of up."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffw: int
    words: int
    window: int = 4096

    @classmethod
    def of(cls, args):
        """The shapes that `add_flags` read."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(args, name) for name in names})

    def backbone(self):
        """As `GemmaBackbone.get_config()` names them."""
        return {
            "vocabulary_size": self.words,
            "num_layers": self.layers,
            "num_query_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_dim": self.hidden,
            "intermediate_dim": 2 * self.ffw,
            "head_dim": self.head_dim,
            "query_head_dim_normalize": True,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": 30.0,
            "attention_logit_soft_cap": 50.0,
            "sliding_window_size": self.window,
            "use_sliding_window_attention": True,
        }

    def shapes(self):
        """{Keras path: shape} of every weight."""
        return names.variable_shapes(self.backbone())

    def parameters(self):
        """Numbers in the model."""
        return sum(int(np.prod(s)) for s in self.shapes().values())

    def floor_flops(self, tokens):
        """What no training of adapters gets around, FLOPs of `tokens`.

        Forward and dX of the linear layers, logits and their gradient.
        Attention's own products are not in it.
        """
        kernels = names.kernel_shapes(self.backbone()).values()
        linear = self.layers * sum(int(np.prod(s)) for s in kernels)
        return 4 * tokens * (linear + self.words * self.hidden)

    def attention_flops(self, rows, tokens):
        """Scores and mixing, forward and backward, within reach only."""
        reach = [min(tokens, self.window), tokens]
        pairs = sum(
            r * (r + 1) / 2 + (tokens - r) * r
            for i in range(self.layers)
            for r in [reach[i % 2]]
        )
        return 12 * rows * pairs * self.heads * self.head_dim


def write(folder, sizes, *, dtype="float32", seed=0):
    """Writes the model as a Hugging Face folder that both sides load.

    Args:
        folder: where to; made if it is not there.
        sizes: `Sizes`.
        dtype: of the weights: float32, bfloat16 or float16.
        seed: of the weights.
    """
    import ml_dtypes
    import safetensors.numpy

    proto = embedded.preset_folder() / "assets/tokenizer/vocabulary.spm"
    if sizes.words < 4096:
        raise config.UserError(
            f"--words={sizes.words}: the loader wants a tokenizer, and the "
            f"embedded one has 4096 words. Name at least as many."
        )
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, shape in sizes.shapes().items():
        name, array = names.to_huggingface(path, _values(rng, path, shape))
        tensors[name] = np.ascontiguousarray(array, dtype=kind)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    settings = huggingface.huggingface_config(sizes.backbone(), dtype=dtype)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(proto.read_bytes())


def _values(rng, path, shape):
    """Of a size at which every layer matters and nothing overflows."""
    if path.endswith("scale"):
        return np.full(shape, 0.1, "float32")
    fan_in = shape[-1] if "embedding" in path else np.prod(shape[:-1])
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        fan_in = shape[1]
    return rng.standard_normal(shape, "float32") * np.float32(fan_in**-0.5)


def rows(words, count, tokens, *, seed=0):
    """Random ids, int32 [count, tokens + 1], none of them special."""
    rng = np.random.default_rng([seed, 1])
    return rng.integers(8, words, (count, tokens + 1)).astype("int32")
