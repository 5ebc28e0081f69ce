"""The program of a train step, compiled without weights. JAX only.

A model whose variables have shapes and no values is traced through Keras's own
`train_step` of the very `FineTuner` that trains, and compiled: for a TPU by
libtpu, on a machine that has none; for a CPU by XLA. What comes back is the
compiler's own account of a device's memory. It says nothing of speed.
"""

import argparse
import collections
import dataclasses
import re
import time

import keras
import keras_hub
import numpy as np

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.model import layouts, sharding, weights
from keras_gemma_ft.tuning import trainer


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said.

    Attributes:
        fits: whether it accepted the program.
        arguments: bytes a device of weights, adapters, optimizer and batch.
        temporaries: bytes a device of everything else.
        limit: bytes that it allows; 0 where it names no limit.
        seconds: of tracing and compiling.
        program: `jax.stages.Compiled`, None if refused.
    """

    fits: bool
    arguments: int
    temporaries: int
    limit: int
    seconds: float
    program: object = None

    @property
    def total(self):
        """Bytes a device."""
        return self.arguments + self.temporaries


def model(cfg, settings, dtype):
    """`trainer.build` of a backbone without values.

    Args:
        cfg: `config.Config`.
        settings: of `GemmaBackbone`, see `planning.shapes`.
        dtype: of the frozen weights and the matmuls.

    Returns:
        `fine_tuner.FineTuner`, built; its large variables have no value.
    """
    settings = dict(settings)
    scalar = settings.pop("query_pre_attn_scalar", None)
    settings.pop("dtype", None)
    policy = dtype
    if not cfg.lora.rank and dtype != "float32":
        policy = f"mixed_{dtype}"
    backbone = weights.never(
        lambda: keras_hub.models.GemmaBackbone(**settings, dtype=policy)
    )
    if scalar is not None:
        backbone.query_pre_attn_scalar = scalar
    backbone.preset = cfg.preset
    causal_lm = keras_hub.models.GemmaCausalLM(
        backbone=backbone, preprocessor=None
    )
    loaded = argparse.Namespace(causal_lm=causal_lm)
    return trainer.build(cfg, loaded, steps=1000, warmup=10)


def lower(tuner, batch):
    """Keras's own JAX train step of a compiled `keras.Model`, traced.

    Args:
        tuner: `fine_tuner.FineTuner`, or any Keras model that is compiled, with
            values or, after `on_mesh`, without.
        batch: what `fit` would be given for one step: arrays, or
            `jax.ShapeDtypeStruct`s.

    Returns:
        `jax.stages.Lowered`.
    """
    import jax

    if not tuner.built:
        tuner._symbolic_build(data_batch=batch)
    state = tuner._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    # As Keras's `make_train_function` does.
    shardings = None
    if keras.distribution.distribution() is not None:
        shardings = (None, tuner._get_state_sharding_spec())
    step = jax.jit(tuner.train_step, donate_argnums=0, out_shardings=shardings)
    return step.lower(state, batch)


def on_mesh(tuner, shape, rows, tokens, where=None):
    """Lays a model without values out on devices that need not exist.

    Args:
        tuner: of `model`.
        shape: (batch, model) of the mesh.
        rows: of a micro-batch, all devices.
        tokens: of a row.
        where: `jax.Device`s, of a topology or of this machine.

    Returns:
        The batch for `lower`, as `jax.ShapeDtypeStruct`s. Keras's
        distribution is set, and the variables' values are such, too.
    """
    import jax

    like = batch(lambda dtype: np.zeros((rows, tokens), dtype))
    tuner._symbolic_build(data_batch=like)
    variables = [
        *tuner.variables,
        *tuner.optimizer.variables,
        *tuner.metrics_variables,
    ]
    layout = row_layout = None
    if shape != (1, 1) or where is not None:
        mesh = keras.distribution.DeviceMesh(
            shape, [layouts.BATCH, layouts.MODEL], np.array(where)
        )
        layout = sharding.Sharded(mesh)
        row_layout = layout.get_data_layout((rows, tokens)).backend_layout
        keras.distribution.set_distribution(layout)
    for v in variables:
        spec = layout and layout.get_variable_layout(v).backend_layout
        v._value = jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=spec)
    return batch(
        lambda dtype: jax.ShapeDtypeStruct(
            (rows, tokens), dtype, sharding=row_layout
        )
    )


def batch(array):
    """A batch (`data.pipeline`) of `array(dtype)`s, each [rows, tokens]."""
    names = ("token_ids", "segment_ids", "positions")
    x = {name: array("int32") for name in names}
    return x, array("int32"), array("float32")


def compile(cfg, settings, device, mesh, *, dtype):
    """Compiles the step of `cfg` for `device`; in a process of its own.

    It sets Keras's distribution and lowers a model that cannot run.

    Args:
        cfg: `config.Config`; its remat, scan, chunk and batch settings count.
        settings: of `GemmaBackbone`.
        device: `planning.devices.Device` of kind "tpu" or "cpu".
        mesh: (batch, model).
        dtype: of weights and matmuls.

    Returns:
        `Compiled`.
    """
    began = time.monotonic()
    rows, _ = pipeline.micro_batches(
        cfg.data.batch_size, cfg.data.micro_batch_size
    )
    where = topology(device) if device.topology else None
    if where is None and mesh != (1, 1):
        import jax

        where = jax.devices()[: mesh[0] * mesh[1]]
    tuner = model(cfg, settings, dtype)
    try:
        like = on_mesh(tuner, mesh, rows, cfg.data.sequence_length, where)
        lowered = lower(tuner, like)
        runtime.say(f"traced in {time.monotonic() - began:.0f} s; compiling")
        program = lowered.compile()
    except Exception as error:
        return _refused(error, time.monotonic() - began)
    finally:
        keras.distribution.set_distribution(None)
    used = program.memory_analysis()
    kept = used.output_size_in_bytes - used.alias_size_in_bytes
    return Compiled(
        True,
        used.argument_size_in_bytes,
        used.temp_size_in_bytes + max(kept, 0),
        int(device.memory) if device.kind == "tpu" else 0,
        time.monotonic() - began,
        program,
    )


_SIZE = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)G\)")


def _refused(error, seconds):
    """The `Compiled` of a RESOURCE_EXHAUSTED; other errors are raised."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    temporaries = limit = 0
    if found := _SIZE.search(text):
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
        temporaries = int(float(found[1]) * unit)
        limit = int(float(found[3]) * 2**30)
    return Compiled(False, 0, temporaries, limit, seconds)


def topology(device):
    """The `jax.Device`s of a TPU that is not here, as libtpu describes it.

    Raises:
        config.UserError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=device.topology
        )
    except Exception as error:
        text = str(error).strip().splitlines()[0][:200]
        raise config.UserError(
            f"--compile for {device.name} ({device.topology}): {text}. It "
            f"needs libtpu: pip install 'keras_gemma_ft[plan]'. Without "
            f"--compile the plan is an estimate."
        ) from None
    return found.devices


def soft_caps(program):
    """{where in the step: how often} of the soft caps of a compiled program.

    Forward and backward passes have names of their own; a fusion may compute
    one cap twice, and a loop's body stands for all its turns.

    Args:
        program: `Compiled.program`. JAX 0.10.2 cannot read the text of every
            program of libtpu 0.0.52 and then raises: 27B's for a v5p.
    """
    found = r' tanh\([^\n]*op_name="([^"]*soft_cap[^"]*)"'
    return dict(collections.Counter(re.findall(found, program.as_text())))
