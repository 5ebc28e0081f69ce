"""Adapter <-> stock Keras `.lora.h5`, without keras.

Layout (keras/src/saving/saving_lib.py, H5IOStore; keras_hub/src/models/
backbone.py, save_lora_weights):

    lora/vars/rank                       int, one for all layers
    lora/<index>/vars/lora_kernel_a|b    float32

<index> is the layer's position among the backbone's flattened layers that
have weights. The file knows no alpha: B holds s * B, and stock Keras scales
by 1. Files are untrusted: nothing but plain, local datasets of the expected
shape is read.
"""

import io
import pathlib

import h5py
import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats.atomic import replacing
from keras_gemma_ft.formats.names import kernel_shapes

# One decoder block as Keras's Layer._flatten_layers lists it: depth first,
# children in reverse order of creation.
_BLOCK = (
    "decoder_block",
    "ffw_linear",
    "ffw_gating_2",
    "ffw_gating",
    "post_ffw_norm",
    "pre_ffw_norm",
    "attention",
    "attention_output",
    "value",
    "key",
    "query",
    "post_attention_norm",
    "pre_attention_norm",
)
_KERNELS = ("lora_kernel_a", "lora_kernel_b")


def layer_index(num_layers):
    """Where stock KerasHub finds each target of a Gemma 2 backbone.

    Args:
        num_layers: decoder blocks.

    Returns:
        dict: (layer, target) -> position in `save_lora_weights`' numbering.
        Layer 0 of the list is the token embedding.
    """
    return {
        (layer, target): 1 + layer * len(_BLOCK) + _BLOCK.index(target)
        for layer in range(num_layers)
        for target in low_rank.TARGETS
    }


def write_keras(path, adapter, layer_index):
    """Write what `enable_lora(rank, targets)`, `load_lora_weights` read.

    The rank is `low_rank.stock_rank(adapter)`. Layers that the adapter
    leaves out are written as zeros: stock Keras wants every layer.

    Args:
        path: ends in `.lora.h5`; complete or absent afterwards.
        adapter: `low_rank.Adapter`, either style.
        layer_index: as made by `layer_index`.

    Raises:
        UserError: the name does not end in `.lora.h5`.
    """
    if not str(path).endswith(".lora.h5"):
        raise UserError(
            f"A stock Keras adapter's name must end in .lora.h5; got {path}."
        )
    rank = low_rank.stock_rank(adapter)
    factor = np.float32(
        low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    )
    alike = {target: pair for (_, target), pair in adapter.weights.items()}
    # In memory first: HDF5's own error of a full disk names no file.
    whole = io.BytesIO()
    with h5py.File(whole, "w") as file:
        file["lora/vars/rank"] = rank
        for (layer, target), index in layer_index.items():
            if target not in adapter.targets:
                continue
            a, b = adapter.weights.get(
                (layer, target), [0 * part for part in alike[target]]
            )
            pair = low_rank.to_stock(adapter.style, target, a, b * factor, rank)
            for name, value in zip(_KERNELS, pair):
                file[f"lora/{index}/vars/{name}"] = value
    with replacing(path, whole.getbuffer().nbytes) as partial:
        partial.write_bytes(whole.getbuffer())


def read_keras(path, backbone, *, targets=None, base=""):
    """Read a stock `.lora.h5`; strict.

    Args:
        path: file written by KerasHub or by `write_keras`.
        backbone: dict as of `GemmaBackbone.get_config()`; the file says only
            positions, so the model must be known.
        targets: Keras layer names it must hold; None takes what is there.
        base: preset name to note in the adapter.

    Returns:
        `low_rank.Adapter` of style "keras" and scale 1 (alpha = rank).

    Raises:
        UserError: not such a file, or any link, unknown or missing index, or
            wrong shape in it; all are listed.
    """
    path = pathlib.Path(path)
    wrong = []
    try:
        with h5py.File(path, "r") as file:
            rank, weights = _read(file, backbone, targets, wrong)
    except OSError as error:
        raise UserError(
            f"{path} is not a whole HDF5 file ({error}). Write it again with "
            "backbone.save_lora_weights, or take the PEFT folder."
        ) from error
    if wrong:
        raise UserError(
            f"{path} is not a LoRA file of this model:\n  "
            + "\n  ".join(wrong)
            + "\nCheck --preset, or write the adapter again."
        )
    return low_rank.Adapter(
        style="keras",
        rank=rank,
        alpha=float(rank),
        rslora=False,
        dropout=0.0,
        targets=low_rank.ordered(target for _, target in weights),
        weights=weights,
        base=base,
    )


def _read(file, backbone, targets, wrong):
    positions = {
        str(index): key
        for key, index in layer_index(backbone["num_layers"]).items()
    }
    wrong += [f"{n}: unexpected" for n in sorted(set(file) - {"lora"})]
    lora = _group(file, "lora", wrong)
    rank = _dataset(_group(lora, "vars", wrong), "rank", (), wrong)
    kernels = kernel_shapes(backbone)
    # A larger rank serves nothing, but could ask for all of the memory.
    most = max(size for shape in kernels.values() for size in shape)
    if rank is None or rank not in range(1, most + 1):
        wrong.append(f"lora/vars/rank: {rank}, expected 1 to {most}")
        return 0, {}
    weights = {}
    for name in sorted(set(lora) - {"vars"}, key=lambda n: (len(n), n)):
        if name not in positions:
            wrong.append(f"lora/{name}: no such LoRA layer in this model")
            continue
        target = positions[name][1]
        group = _group(_group(lora, name, wrong), "vars", wrong)
        shapes = low_rank.pair_shapes(
            "keras", target, kernels[target], int(rank)
        )
        weights[positions[name]] = tuple(
            _dataset(group, kernel, shape, wrong)
            for kernel, shape in zip(_KERNELS, shapes)
        )
    wrong += _gaps(weights, positions, targets)
    return int(rank), weights


def _gaps(weights, positions, targets):
    held = low_rank.ordered(target for _, target in weights)
    wanted = held if targets is None else low_rank.ordered(targets)
    for target in held:
        if target not in wanted:
            yield f"{target}: in the file, but not among the targets"
    if not wanted:
        yield "lora: holds no layers"
    for index, key in positions.items():
        if key[1] in wanted and key not in weights:
            yield f"lora/{index} ({key[1]} of layer {key[0]}): missing"


def _group(parent, name, wrong):
    """A subgroup that lies in this very file, or {} with a complaint."""
    return _member(parent, name, h5py.Group, wrong) or {}


def _dataset(parent, name, shape, wrong):
    """A dataset's value as float32 `shape`, or None with a complaint."""
    data = _member(parent, name, h5py.Dataset, wrong)
    if data is None:
        return None
    if data.is_virtual or data.external:
        wrong.append(f"{data.name}: its bytes lie in another file")
    elif data.shape != shape:
        wrong.append(f"{data.name}: shape {data.shape}, expected {shape}")
    elif data.dtype.kind not in "fiu":
        wrong.append(f"{data.name}: dtype {data.dtype}, expected a float")
    else:
        value = data[()].astype("float32")
        if np.isfinite(value).all():
            return value
        wrong.append(f"{data.name}: holds NaN or infinity")
    return None


def _member(parent, name, kind, wrong):
    where = f"{getattr(parent, 'name', '?').rstrip('/')}/{name}"
    # An empty dict stands for a parent already complained of.
    if parent == {}:
        return None
    # `in`, `get` and `[]` follow links to other files; these two do not.
    links = parent.id.links
    if not links.exists(name.encode()):
        wrong.append(f"{where}: missing")
        return None
    if links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        wrong.append(f"{where}: a link, expected the data itself")
        return None
    member = parent[name]
    if not isinstance(member, kind):
        wrong.append(f"{where}: expected a {kind.__name__}")
        return None
    return member
