"""Settings of how the model is held and of the processes that share it."""

import dataclasses
import re

from keras_gemma_ft.config.fields import setting, that


@dataclasses.dataclass(frozen=True)
class Model:
    """Model: how the weights are stored and the blocks computed."""

    dtype: str = setting(
        "auto",
        "dtype of the frozen weights and of the matmuls",
        ("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "none",
        "storage of the frozen decoder kernels",
        ("none", "int8", "int4", "nf4"),
    )
    quantize_embedding: str = setting(
        "none",
        "storage of the frozen token table: int8 halves it, and is a little "
        "less exact",
        ("none", "int8"),
    )
    quantize_cache: str = setting(
        "auto",
        "folder that keeps quantised weights for the next run; 'auto' is "
        "keras_gemma_ft/quantized in $XDG_CACHE_HOME or ~/.cache for models "
        "from 256 MB on, 'none' keeps nothing",
        expect=that(
            str.strip,
            "it is empty; name a folder, or type --model.quantize_cache=none.",
        ),
    )
    remat: str = setting(
        "auto",
        "recompute each decoder block in the backward pass",
        ("auto", "none", "block"),
    )
    scan: str = setting(
        "auto",
        "JAX: compile one loop over the decoder blocks, not every block; auto "
        "does so from 16 blocks on (on a GPU where blocks are recomputed)",
        ("auto", "on", "off"),
    )
    compile: str = setting(
        "auto",
        "Torch: compile a decoder block for all layers (torch.compile); auto "
        "does so on a GPU",
        ("auto", "on", "off"),
    )


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts: the processes that work on one run."""

    count: int = setting(
        0,
        "processes of the job, one a host (JAX, Torch); -1 asks the cluster "
        "(JAX: TPU pod, Slurm, Kubernetes, MPI); 0 is "
        "$KERAS_DISTRIBUTION_NUM_PROCESSES, else one",
    )
    index: int = setting(
        -1,
        "this process's number, from 0; -1 is $KERAS_DISTRIBUTION_PROCESS_ID",
    )
    coordinator: str = setting(
        "",
        "address:port of process 0; '' is the first of "
        "$KERAS_DISTRIBUTION_JOB_ADDRESSES",
    )
    local: str = setting(
        "auto",
        "Torch: processes that train starts on this machine, a GPU each; "
        "'auto' is one for each GPU, as far as the batch divides, else a "
        "number",
        expect=that(
            re.compile(r"auto|[1-9]\d*").fullmatch,
            "expected auto or the number of processes of this machine, as in "
            "--hosts.local=2.",
        ),
    )
