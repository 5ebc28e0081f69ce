"""Quantised weights on disk: encoded once, then read as they are used.

`FOLDER/<key>.safetensors` holds every variable of a model as it is stored, its
checksum, and the fingerprint of the float weights. The key is a hash of the
source files' names, sizes and times, of the settings, and of the code that
encodes. Nothing here is needed: what goes wrong is told, and weights are then
read from their source.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import names, tensors
from keras_gemma_ft.model import codes

# Smaller models are encoded in a second.
_LEAST = 2**28
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json",
          "*.weights.h5", "*.weights.json")  # fmt: skip
# Whose change may change a code, or which weight it is of.
_CODE = (codes, names, tensors)
# What a killed process leaves, and the age at which it goes: a day, in s.
_PARTIAL, _STALE = ".*.partial", 86400


def place(setting, source, dtype):
    """The file that keeps the weights of a folder; None: none does.

    Args:
        setting: `config.Model`.
        source: the model's folder, or None where it is not known.
        dtype: of the variables that are not quantised.
    """
    if source is None or setting.quantize_cache == "none":
        return None
    if {setting.quantize, setting.quantize_embedding} == {"none"}:
        return None
    files = _files(source)
    if setting.quantize_cache != "auto":
        folder = pathlib.Path(setting.quantize_cache).expanduser()
    elif _size(files) < _LEAST:
        return None
    else:
        folder = config.cache_folder("quantized")
    return folder and folder / f"{_key(files, setting, dtype)}.safetensors"


def _files(source):
    found = {path for glob in _FILES for path in source.glob(glob)}
    return sorted(path for path in found if path.is_file())


def _size(files):
    return sum(path.stat().st_size for path in files)


def _key(files, setting, dtype):
    """Hash of all that decides what is kept."""
    digest = hashlib.sha256()
    for module in _CODE:
        digest.update(pathlib.Path(module.__file__).read_bytes())
    stats = [(path, path.stat()) for path in files]
    told = {
        "files": [[p.name, s.st_size, s.st_mtime_ns] for p, s in stats],
        "kernels": setting.quantize,
        "table": setting.quantize_embedding,
        "dtype": dtype,
        "code": digest.hexdigest(),
    }
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Damaged(Exception):
    """A kept file is not what was written."""


class Kept:
    """What a file keeps.

    Args:
        path: of the file.

    Attributes:
        fingerprint: of the float weights.

    Raises:
        Damaged: it is not whole.
    """

    def __init__(self, path):
        self.path = path
        try:
            self.entries, told = tensors.header(path)
            self.sums = json.loads(told["sums"])
            self.fingerprint = told["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{type(error).__name__}: {error}") from None

    def value(self, path):
        """What a variable is assigned: an array, or a dict of them.

        Raises:
            Damaged: it is not there, or not what was written.
        """
        layer = path.rpartition("/")[0]
        if path in self.entries:
            return self._read(path)
        found = {
            name.rpartition("/")[2]: self._read(name)
            for name in self.entries
            if name.rpartition("/")[0] == layer
        }
        if not found:
            raise Damaged(f"{path} is missing")
        return found

    def _read(self, name):
        try:
            array = tensors.read(self.path, self.entries[name])
        except (OSError, ValueError) as error:
            raise Damaged(str(error)) from None
        if tensors.checksum(array) != self.sums[name]:
            raise Damaged(f"{name} is not what was written")
        return array


def discard(path, why):
    """Takes a damaged file away."""
    runtime.say(f"{path} is damaged ({why}): encoded anew")
    with contextlib.suppress(OSError):
        path.unlink()


class Keeper:
    """Writes a file as weights arrive; it appears when it is whole.

    Args:
        path: of the file; None keeps nothing.
        source: the model's folder.
    """

    def __init__(self, path, source):
        self.path, self.writer, self.sums = path, None, {}
        if path is None:
            return
        name = f".{path.stem}.{uuid.uuid4().hex[:8]}.partial"
        self.partial = path.with_name(name)
        with self._warning():
            path.parent.mkdir(parents=True, exist_ok=True)
            _tidy(path.parent)
            # No more than the source takes is ever written.
            need = _size(_files(source))
            free = shutil.disk_usage(path.parent).free
            if free < need:
                raise OSError(
                    f"{free / 2**30:.1f} GiB are free, {need / 2**30:.1f} "
                    f"may be needed"
                )
            self.writer = tensors.Writer(self.partial)

    def note(self, path, value):
        """A variable's array, or dict of stored arrays."""
        if self.writer is None:
            return
        parts = {path: value}
        if isinstance(value, dict):
            layer = path.rpartition("/")[0]
            parts = {f"{layer}/{name}": x for name, x in value.items()}
        with self._warning():
            for name, array in parts.items():
                self.writer.put(name, array)
                self.sums[name] = tensors.checksum(array)

    def finish(self, fingerprint, path):
        """All has come. `path` is the file's name now: another one, and the
        source has changed while it was read."""
        if self.writer is None:
            return
        if path != self.path:
            runtime.say("the model's files changed: its codes are not kept")
            self.drop()
            return
        told = {"fingerprint": fingerprint, "sums": json.dumps(self.sums)}
        with self._warning():
            self.writer.finish(told)
            os.replace(self.partial, self.path)
            self.writer = None
            runtime.say(
                f"quantised weights are kept for the next run: {self.path}, "
                f"{self.path.stat().st_size / 2**30:.2f} GiB; "
                f"--model.quantize_cache=none keeps none"
            )

    def drop(self):
        """Keeps nothing."""
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
            with contextlib.suppress(OSError):
                self.partial.unlink()
        self.writer = None

    @contextlib.contextmanager
    def _warning(self):
        """A block whose failure to write is told, and no more."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            runtime.say(
                f"quantised weights are not kept in {self.path.parent} "
                f"({reason}); --model.quantize_cache=FOLDER names another"
            )
            self.drop()


def _tidy(folder):
    for old in folder.glob(_PARTIAL):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink()
