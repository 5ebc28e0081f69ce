"""A Gemma 2 in Keras's preset format, read and written without keras.

    config.json            the backbone's class and arguments
    metadata.json          versions
    model.weights.h5       or model_00000.weights.h5, ... and the map
                           model.weights.json: {"weight_map": {group: file}}
    tokenizer.json         the tokenizer's class
    assets/tokenizer/vocabulary.spm

A variable is the dataset `<group>/vars/0` (keras/src/saving/saving_lib.py,
`_save_state`); HDF5 knows no bfloat16, so such a one is two opaque bytes with
an attribute. Files are untrusted: plain local datasets of the expected shape
are read, and nothing else.
"""

import json
import pathlib
import re

import h5py
import ml_dtypes
import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats.huggingface import query_scalar, read_json
from keras_gemma_ft.formats.names import variable_shapes

WEIGHTS, MAP = "model.weights.h5", "model.weights.json"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What GemmaDecoderBlock calls the layers that hold its kernels.
_LAYERS = {
    "query": "attention/query_dense",
    "key": "attention/key_dense",
    "value": "attention/value_dense",
    "attention_output": "attention/output_dense",
    "ffw_gating": "gating_ffw",
    "ffw_gating_2": "gating_ffw_2",
}
_SHARD = re.compile(r"\w[\w.\-]*\.weights\.h5")
_ARGUMENTS = (
    "vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads",
    "hidden_dim", "intermediate_dim", "head_dim", "query_head_dim_normalize",
    "use_post_ffw_norm", "use_post_attention_norm", "final_logit_soft_cap",
    "attention_logit_soft_cap", "sliding_window_size",
    "use_sliding_window_attention",
)  # fmt: skip


def group_of(path):
    """The HDF5 group of a Keras variable path, such as `layers/.../vars`."""
    if path.startswith("token_embedding"):
        return "layers/reversible_embedding/vars"
    if path.startswith("final_normalization"):
        return "layers/rms_normalization/vars"
    block, *inner = path.split("/")[:-1]
    number = int(block.removeprefix("decoder_block_"))
    # The first layer of a class has no number in Keras's names.
    block = "gemma_decoder_block" + (f"_{number}" if number else "")
    layer = _LAYERS.get(inner[-1], inner[-1])
    return f"layers/{block}/{layer}/vars"


class KerasPreset:
    """A preset folder as a reader; see `formats/models.py`.

    Args:
        folder: where it is.

    Raises:
        UserError: it is not a whole Gemma 2; all that is wrong is listed.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        told = read_json(self.folder / "config.json").get("config")
        missing = [n for n in _ARGUMENTS if n not in (told or {})]
        if missing:
            raise UserError(
                f"{self.folder / 'config.json'} is not that of a Gemma 2 "
                f"backbone: it has no {', '.join(missing)}."
            )
        self.backbone = {name: told[name] for name in _ARGUMENTS}
        self.backbone["query_pre_attn_scalar"] = query_scalar(self.backbone)
        self.shapes = variable_shapes(self.backbone)
        self.paths = list(self.shapes)
        self.files = self._find()
        self.dtypes = self._check()

    def _find(self):
        """{Keras path: the file that holds it}."""
        if (self.folder / WEIGHTS).is_file():
            return dict.fromkeys(self.paths, WEIGHTS)
        if not (self.folder / MAP).is_file():
            raise UserError(f"{self.folder} has neither {WEIGHTS} nor {MAP}.")
        listed = read_json(self.folder / MAP).get("weight_map")
        listed = listed if type(listed) is dict else {}
        files, wrong = {}, []
        for path in self.paths:
            file = listed.get(f"/{group_of(path)}")
            file = file[0] if type(file) is list and file else file
            if type(file) is not str or not _SHARD.fullmatch(file):
                wrong.append(f"{path}: {file!r} is no file of weights")
            files[path] = file
        if wrong:
            raise UserError(
                f"{self.folder / MAP} does not name the weights of a Gemma 2:"
                "\n  " + "\n  ".join(wrong[:20])
            )
        return files

    def _check(self):
        """{Keras path: dtype}, all headers looked at, nothing read."""
        wrong, dtypes = [], {}
        for file in dict.fromkeys(self.files.values()):
            held = [p for p in self.paths if self.files[p] == file]
            try:
                with h5py.File(self.folder / file, "r") as opened:
                    for path in held:
                        dtypes[path] = self._kind(opened, path, wrong)
            except OSError as error:
                wrong.append(f"{file}: missing, truncated or damaged ({error})")
        if wrong:
            raise UserError(
                f"{self.folder} is not a whole Gemma 2 model:\n  "
                + "\n  ".join(wrong[:20])
                + "\nFetch these files again, or check config.json."
            )
        return dtypes

    def _kind(self, file, path, wrong):
        """The dtype of a variable; a complaint where it cannot be read."""
        name = f"{group_of(path)}/0"
        at, parts = file, name.split("/")
        for part in parts:
            links = at.id.links if isinstance(at, h5py.Group) else None
            if links is None or not links.exists(part.encode()):
                wrong.append(f"{path}: there is no {name}")
                return None
            if links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                wrong.append(f"{path}: a link, expected the data itself")
                return None
            at = at[part]
        if not isinstance(at, h5py.Dataset) or at.is_virtual or at.external:
            wrong.append(f"{path}: its bytes lie in another file")
            return None
        if at.shape != self.shapes[path]:
            wrong.append(f"{path}: {at.shape}, expected {self.shapes[path]}")
        if at.dtype == "V2" and at.attrs.get("dtype") == "bfloat16":
            return _BFLOAT16
        if at.dtype.kind != "f":
            wrong.append(f"{path}: dtype {at.dtype}, expected a float")
        return at.dtype

    def read(self, path):
        """One variable, with Keras's shape and the dtype it is stored in."""
        with h5py.File(self.folder / self.files[path], "r") as file:
            value = file[f"{group_of(path)}/0"][()]
        return value.view(self.dtypes[path])

    def vocabulary(self):
        """The bytes of the SentencePiece model."""
        return (self.folder / VOCABULARY).read_bytes()


def write_preset(folder, model, proto, *, dtype, shards, versions):
    """Writes a preset folder that stock KerasHub's `from_preset` reads.

    Args:
        folder: must not exist yet.
        model: a reader; see `formats/models.py`.
        proto: bytes of the SentencePiece model.
        dtype: name of the dtype that the weights are stored in.
        shards: lists of paths, one for each file, as `models.split` makes.
        versions: what `runtime.versions` tells, for metadata.json.
    """
    folder = pathlib.Path(folder)
    (folder / VOCABULARY).parent.mkdir(parents=True)
    (folder / VOCABULARY).write_bytes(proto)
    weight_map = {}
    for number, paths in enumerate(shards):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model_{number:05}.weights.h5"
        with h5py.File(folder / name, "w") as file:
            for path in paths:
                _put(file, group_of(path), model.read(path), dtype)
                weight_map[f"/{group_of(path)}"] = name
    if len(shards) > 1:
        size = sum((folder / name).stat().st_size for name in
                   dict.fromkeys(weight_map.values()))  # fmt: skip
        told = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write(folder / MAP, told)
    _write(folder / "config.json", _config(model.backbone, dtype))
    _write(folder / "tokenizer.json", _tokenizer())
    _write(
        folder / "metadata.json",
        {
            "keras_version": versions["keras"],
            "keras_hub_version": versions["keras-hub"],
            "tasks": ["CausalLM"],
        },
    )


def _put(file, group, value, dtype):
    if dtype == "bfloat16":
        data = file.create_dataset(
            f"{group}/0", data=value.astype(_BFLOAT16, copy=False).view("V2")
        )
        data.attrs["dtype"] = "bfloat16"
    else:
        file[f"{group}/0"] = value.astype(dtype, copy=False)


def _policy(dtype):
    """A dtype policy as Keras writes it."""
    return {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype},
        "registered_name": None,
    }


def _config(backbone, dtype):
    settings = {name: backbone[name] for name in _ARGUMENTS}
    return {
        "module": "keras_hub.src.models.gemma.gemma_backbone",
        "class_name": "GemmaBackbone",
        "config": {
            "name": "gemma_backbone",
            "trainable": True,
            "dtype": _policy(dtype),
            **settings,
            "layer_norm_epsilon": 1e-6,
            "dropout": 0,
        },
        "registered_name": "keras_hub>GemmaBackbone",
    }


def _tokenizer():
    return {
        "module": "keras_hub.src.models.gemma.gemma_tokenizer",
        "class_name": "GemmaTokenizer",
        "config": {
            "name": "gemma_tokenizer",
            "trainable": True,
            "dtype": _policy("int32"),
            "config_file": "tokenizer.json",
            "proto": None,
            "sequence_length": None,
            "add_bos": False,
            "add_eos": False,
        },
        "registered_name": "keras_hub>GemmaTokenizer",
    }


def _write(path, told):
    path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
