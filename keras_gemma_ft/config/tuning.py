"""Settings of the adapters and of the training steps."""

import dataclasses
import math

from keras_gemma_ft.config.fields import (
    at_least,
    names,
    setting,
    that,
    understood,
)
from keras_gemma_ft.config.words import (
    PEFT_NAMES,
    duration,
    seconds,
    targets,
)

OPTIMIZERS = ("adamw", "adamw8bit", "adam", "adafactor", "lion", "sgd")
TRACKERS = ("tensorboard", "wandb", "mlflow")
_DURATION = understood(
    lambda value: duration(value, total=1, steps_per_epoch=1)
)


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA: the adapters."""

    rank: int = setting(
        8, "rank of the adapters; 0 trains every weight", expect=at_least(0)
    )
    alpha: float = setting(
        0.0,
        "the adapters are scaled by alpha/rank; 0 means alpha = rank",
        expect=at_least(0),
    )
    rslora: bool = setting(
        False, "scale by alpha/sqrt(rank) (arXiv 2312.03732) instead"
    )
    dropout: float = setting(
        0.0,
        "dropout on the adapters' input",
        expect=that(
            lambda value: 0 <= value < 1, "expected 0 or more and below 1."
        ),
    )
    targets: str = setting(
        "",
        "layers to adapt: 'all-linear' (what '' means), 'attention', or names, "
        f"KerasHub's ({','.join(PEFT_NAMES)}) or PEFT's "
        f"({','.join(PEFT_NAMES.values())})",
        expect=understood(lambda value: targets(Lora(targets=value))),
    )
    style: str = setting(
        "keras",
        "query/key/value adapters: 'keras' as enable_lora makes them (A for "
        "each head, B shared), 'standard' one pair as in the LoRA paper",
        ("keras", "standard"),
    )
    init: str = setting(
        "default",
        "where A and B start: B at zero; 'pissa' at the kernel's principal "
        "directions (arXiv 2404.02948), 'loftq' at the best fit of the "
        "quantised base's error (arXiv 2310.08659)",
        ("default", "loftq", "pissa"),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Training: how long, how fast, and what is written meanwhile."""

    steps: int = setting(
        0, "optimizer steps; 0 takes --train.epochs", expect=at_least(0)
    )
    epochs: float = setting(
        1.0, "passes over the training rows", expect=at_least(0)
    )
    learning_rate: float = setting(
        2e-4,
        "peak learning rate",
        expect=that(lambda value: 0 < value < math.inf, "expected above 0."),
    )
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up: stays, or falls to zero",
        ("constant", "linear", "cosine"),
    )
    warmup: str = setting(
        "3 %", "duration of the linear warm-up", expect=_DURATION
    )
    optimizer: str = setting(
        "adamw",
        "a Keras optimizer; adamw8bit keeps AdamW's state in 8 bits (arXiv "
        "2110.02861): 2 bytes a trained number, not 8",
        OPTIMIZERS,
    )
    weight_decay: float = setting(
        0.0, "decoupled weight decay", expect=at_least(0)
    )
    clip_norm: float = setting(
        1.0, "clip the global gradient norm; 0 is off", expect=at_least(0)
    )
    log_every: str = setting(
        "10 steps", "duration between metrics lines", expect=_DURATION
    )
    eval_every: str = setting(
        "25 %",
        "duration between evaluations on --data.eval; '0' is off",
        expect=_DURATION,
    )
    checkpoint_every: str = setting(
        "25 %",
        "duration between checkpoints; '0' writes only the last",
        expect=_DURATION,
    )
    keep_checkpoints: int = setting(2, "complete checkpoints that stay")
    patience: int = setting(
        0,
        "stop after this many evaluations without a better one; 0 is off",
        expect=at_least(0),
    )
    loss_chunk: int = setting(
        0,
        "tokens whose logits exist at once; 0 picks about 24 MB",
        expect=at_least(0),
    )
    samples: int = setting(
        4, "prompts completed before and after", expect=at_least(0)
    )
    exact_match: int = setting(
        -1,
        "held-out prompts answered before and after and compared with their "
        "references; -1 takes up to 200 if the answers are short, else none",
        expect=at_least(-1),
    )
    time_budget: str = setting(
        "",
        "checkpoint and exit 75 after this long, e.g. 8.5h or 30m",
        expect=understood(seconds),
    )
    trackers: str = setting(
        "",
        "also log to these (name,name): " + ", ".join(TRACKERS),
        expect=names(
            "|".join(TRACKERS),
            f"expected names out of {', '.join(TRACKERS)}, with commas "
            f"between.",
        ),
    )
