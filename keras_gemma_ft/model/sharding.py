"""The mesh of a run, and what is told to XLA about it. JAX only.

`layouts` says how each weight is split. All weights of a small model stay whole
on every device, where the mesh is left to us.
"""

import keras
import ml_dtypes  # noqa: F401  numpy then knows bfloat16
import numpy as np

from keras_gemma_ft import config, runtime
from keras_gemma_ft.model import hosts, layouts

# Of a device's memory that weights may take whole, and bytes if unknown: then
# no layer waits for its weights.
_WHOLE_SHARE, _WHOLE_BYTES = 1 / 8, 2**30


def start(cfg, weights=lambda: None):
    """Sets Keras's distribution for `cfg`; must precede any weight.

    Does nothing on one device. Says the mesh, and why.

    Args:
        cfg: `config.Config`.
        weights: function that tells the bytes of all weights, or None.

    Raises:
        UserError: a mesh that the devices or the batch do not allow.
    """
    hosts.start(cfg)
    count = 1
    if keras.config.backend() == "jax":
        count = len(keras.distribution.list_devices())
    shape, why = mesh_shape(cfg, count)
    if shape == (1, 1):
        return
    mesh = keras.distribution.DeviceMesh(shape, [layouts.BATCH, layouts.MODEL])
    whole = False
    if cfg.mesh == "auto" and shape[1] == 1:
        whole, reason = stay_whole(weights(), _device_bytes())
        why = f"{why}; {reason}"
    keras.distribution.set_distribution(Sharded(mesh, whole=whole))
    runtime.say(f"mesh: {shape[0]}x{shape[1]} ({why})")


def stay_whole(weights, memory):
    """(should every device hold all weights, reason).

    Args:
        weights: bytes of the model; None is unknown.
        memory: bytes of a device; None is unknown.
    """
    if weights is None:
        return False, "weights split: their size is not known yet"
    limit = memory * _WHOLE_SHARE if memory else _WHOLE_BYTES
    known = "an eighth of a device" if memory else "1 GiB"
    size = f"{weights / 2**30:.2f} GiB"
    if weights <= limit:
        return True, f"weights whole on each: {size} is at most {known}"
    return False, f"weights split: {size} is more than {known}"


def _device_bytes():
    """Memory of the first device of this process; None on a CPU."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def mesh_shape(cfg, count):
    """((batch, model), reason) for `--mesh` on `count` devices."""
    rows = cfg.data.micro_batch_size or cfg.data.batch_size
    if cfg.mesh == "auto":
        if count == 1:
            return (1, 1), "one device"
        if rows % count == 0:
            return (count, 1), f"{rows} rows divide over {count} devices"
        return (1, count), f"{rows} rows do not divide over {count} devices"
    shape = config.mesh(cfg.mesh)
    if shape[0] * shape[1] != count:
        raise config.UserError(
            f"--mesh={cfg.mesh} needs {shape[0] * shape[1]} devices; the "
            f"{keras.config.backend()} backend has {count} here. "
            f"Use --mesh=auto."
        )
    if rows % shape[0]:
        raise config.UserError(
            f"--mesh={cfg.mesh} splits each batch over {shape[0]} devices, "
            f"but it has {rows} rows. Use --data.batch_size="
            f"{-(-rows // shape[0]) * shape[0]}."
        )
    return shape, "--mesh says so"


class Sharded(keras.distribution.ModelParallel):
    """`ModelParallel` whose layouts look at what divides.

    KerasHub's own map fails on 2B's 4 key/value heads over 8 devices.

    Args:
        mesh: `keras.distribution.DeviceMesh` with axes batch and model.
        whole: every device holds all weights; only rows are split.
    """

    def __init__(self, mesh, *, whole=False):
        layout_map = keras.distribution.LayoutMap(mesh)
        super().__init__(layout_map=layout_map, batch_dim_name=layouts.BATCH)
        self.whole = whole

    @property
    def weights_mesh(self):
        """(batch, model) over which weights are split."""
        return (1, 1) if self.whole else self.device_mesh.shape

    def get_variable_layout(self, variable):
        axes = layouts.layout(variable.path, variable.shape, self.weights_mesh)
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def place(variable, value):
    """A host array as the tensor that will be the variable's value.

    On a mesh each device is given its part alone. Keras would put the whole
    array on the first device and split it there.
    """
    current = keras.distribution.distribution()
    if current is None:
        return keras.ops.convert_to_tensor(value)
    import jax

    layout = current.get_variable_layout(variable).backend_layout
    # Unlike device_put, asks no other host whether it has the same array.
    return jax.make_array_from_callback(value.shape, layout, value.__getitem__)


def describe(variables):
    """What variables take on each device, as one line.

    Args:
        variables: Keras variables, such as a backbone's.
    """
    current = keras.distribution.distribution()
    mesh, where = (1, 1), ""
    if isinstance(current, Sharded):
        mesh = current.weights_mesh
        batch, model = current.device_mesh.shape
        ways = ["FSDP"] * (mesh[0] > 1) + ["tensor parallel"] * (mesh[1] > 1)
        way = " and ".join(ways) or "data parallel"
        where = f" a device of {batch * model} ({way} {batch}x{model})"
    items = [(v.path, v.shape, np.dtype(v.dtype).itemsize) for v in variables]
    held = layouts.bytes_per_device(items, mesh)
    total = sum(held.values())
    unit, size = ("GiB", 2**30) if total >= 2**27 else ("MiB", 2**20)
    parts = [f"{k} {n / size:.2f}" for k, n in held.items() if n]
    return f"{total / size:.2f} {unit}{where}: {', '.join(parts)}"


# --- inside a step ------------------------------------------------------------
# Left to itself, XLA splits the hidden axis as the weights are split and moves
# activations: 9B on 8x1 then sums [65536, 14336] over the devices, layer by
# layer. Told where the rows are, it moves weights, a layer's at a time.


def _mesh():
    """The mesh of the current distribution, or None."""
    current = keras.distribution.distribution()
    return current.device_mesh if isinstance(current, Sharded) else None


def parts():
    """Devices over which a batch is split."""
    mesh = _mesh()
    return 1 if mesh is None else mesh.shape[0]


def split():
    """Whether weights are split over devices."""
    current = keras.distribution.distribution()
    return isinstance(current, Sharded) and current.weights_mesh != (1, 1)


def _constrained(x, mesh, axes):
    import jax

    spec = jax.sharding.PartitionSpec(*axes)
    sharding = jax.sharding.NamedSharding(mesh.backend_mesh, spec)
    return jax.lax.with_sharding_constraint(x, sharding)


def by_rows(x):
    """x [B, ...], its rows where the batch's rows are."""
    mesh = _mesh()
    if mesh is None or x.shape[0] % mesh.shape[0]:
        return x
    from jax.sharding import PartitionSpec

    rest = [PartitionSpec.UNCONSTRAINED] * (len(x.shape) - 1)
    return _constrained(x, mesh, [layouts.BATCH, *rest])


def everywhere(x):
    """x whole on every device; where weights are whole, x as it is."""
    mesh = _mesh()
    if mesh is None or keras.distribution.distribution().whole:
        return x
    return _constrained(x, mesh, [])


def gathered(variable):
    """A weight as the rows of one part of the batch need it: all of "batch".

    Its split over "model" stays.
    """
    value = keras.ops.convert_to_tensor(variable)
    mesh = _mesh()
    if mesh is None:
        return value
    axes = layouts.layout(variable.path, variable.shape, mesh.shape)
    axes = [axis if axis == layouts.MODEL else None for axis in axes]
    return _constrained(value, mesh, axes)


# --- many hosts ---------------------------------------------------------------


def shard():
    """(index, parts): which part of each batch this process must give.

    Processes that hold the same rows give the same part.

    Raises:
        UserError: a mesh on which two processes share some of their rows.
    """
    if hosts.apart():
        return hosts.index(), hosts.count()
    mesh = _mesh()
    if mesh is None or not hosts.many():
        return 0, 1
    import jax

    held = {}
    for row, line in enumerate(mesh.backend_mesh.devices):
        for device in line:
            held.setdefault(device.process_index, set()).add(row)
    return layouts.share_of(jax.process_index(), held)
