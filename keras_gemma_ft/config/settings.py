"""All settings, and which of them cannot stand together."""

import dataclasses

from keras_gemma_ft.config.answers import Generate
from keras_gemma_ft.config.data import Data
from keras_gemma_ft.config.exporting import Export
from keras_gemma_ft.config.fields import (
    UserError,
    at_least,
    refusals,
    setting,
    that,
    understood,
)
from keras_gemma_ft.config.machine import Hosts, Model
from keras_gemma_ft.config.serving import Serve
from keras_gemma_ft.config.tuning import Lora, Train
from keras_gemma_ft.config.words import mesh, preset

EMBEDDED_PRESET = "gemma2_tiny_en"
BACKENDS = ("jax", "tensorflow", "torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """The run: its model, its machine and its folder."""

    preset: str = setting(
        EMBEDDED_PRESET,
        "a KerasHub preset (gemma2_2b_en, gemma2_9b_en, ...), a folder in "
        "Keras preset or Hugging Face format, hf://owner/name or kaggle://...",
        expect=understood(preset),
    )
    backend: str = setting("auto", "Keras backend", ("auto",) + BACKENDS)
    run_dir: str = setting(
        "runs/default",
        "folder of everything a run writes",
        expect=that(
            str.strip, "it is empty; name a folder: --run_dir=runs/mine."
        ),
    )
    seed: int = setting(
        0,
        "of the adapters, the order of the data, sampling",
        expect=at_least(0),
    )
    resume: bool = setting(True, "continue an interrupted run_dir")
    mesh: str = setting(
        "auto",
        "devices as BATCHxMODEL, e.g. 8x1 (JAX)",
        expect=understood(lambda value: value == "auto" or mesh(value)),
    )
    device: str = setting(
        "auto",
        "plan: the machine, such as tpu_v3_8, tpu_v5e_8, t4, 8xh100, cpu, or "
        "a TPU topology (v5e:4x4); auto is the one this runs on",
    )
    compile: bool = setting(
        False, "plan: have the step compiled for that TPU, without one"
    )
    search: bool = setting(
        False, "plan: try meshes, remat, batches and lengths"
    )
    adapter: str = setting(
        "",
        "adapter to load, or for train to go on from: a run folder, a PEFT "
        "folder or a .lora.h5 file; generate, evaluate and serve take several "
        "of one base: a,b",
    )
    data: Data = dataclasses.field(default_factory=Data)
    lora: Lora = dataclasses.field(default_factory=Lora)
    train: Train = dataclasses.field(default_factory=Train)
    model: Model = dataclasses.field(default_factory=Model)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    generate: Generate = dataclasses.field(default_factory=Generate)
    export: Export = dataclasses.field(default_factory=Export)
    serve: Serve = dataclasses.field(default_factory=Serve)
    # No setting: the paths that the user has set, where it is known; `typed`.
    given: frozenset | None = dataclasses.field(
        default=None, compare=False, repr=False
    )


# (What cannot be, given a Config; what is said of it, with its values.)
CONFLICTS = (
    (
        lambda c: (
            c.data.micro_batch_size < 0
            or c.data.micro_batch_size
            and c.data.batch_size % c.data.micro_batch_size
        ),
        "--data.micro_batch_size={data.micro_batch_size} does not divide "
        "--data.batch_size={data.batch_size}. Try "
        "--data.batch_size={data.whole_batch} or --data.micro_batch_size=1.",
    ),
    (
        lambda c: c.lora.rank == 0 and c.lora.targets,
        "--lora.rank=0 trains every weight, so --lora.targets={lora.targets} "
        "has nothing to adapt. Drop it, or use --lora.rank=8.",
    ),
    (
        lambda c: c.lora.rank == 0 and c.model.quantize != "none",
        "--model.quantize={model.quantize} freezes the kernels, "
        "--lora.rank=0 trains them. Use --lora.rank=8.",
    ),
    (
        lambda c: c.lora.rank == 0 and c.model.quantize_embedding != "none",
        "--model.quantize_embedding={model.quantize_embedding} freezes the "
        "token table, --lora.rank=0 trains it. Use --lora.rank=8.",
    ),
    (
        lambda c: c.lora.rank == 0 and c.lora.init != "default",
        "--lora.init={lora.init} is a start for adapters, and --lora.rank=0 "
        "has none. Drop it, or use --lora.rank=8.",
    ),
    (
        lambda c: c.lora.init == "loftq" and c.model.quantize == "none",
        "--lora.init=loftq fits the error of a quantised base, and this one "
        "is not. Add --model.quantize=nf4, or use --lora.init=pissa.",
    ),
    (
        lambda c: c.lora.init == "pissa" and c.lora.dropout,
        "--lora.init=pissa moves the kernels' principal part into the "
        "adapters, and --lora.dropout={lora.dropout} would drop it at random. "
        "Use --lora.dropout=0.",
    ),
)


def check(config):
    """Refuses settings that cannot work, every offence in one message.

    A setting's own refusal is its `expect`; what concerns several settings is
    a line of `CONFLICTS`.
    """
    wrong = [*refusals(config)]
    for cannot, message in CONFLICTS:
        if cannot(config):
            wrong.append(message.format_map(vars(config)))
    if wrong:
        raise UserError("\n".join(wrong))
