"""Where the files of a preset are: a name becomes a folder.

What goes wrong on the way, such as a download that fails, is said with what to
do about it.
"""

import functools
import os
import pathlib

import keras_hub

from keras_gemma_ft import config, embedded
from keras_gemma_ft.formats import atomic, huggingface
from keras_gemma_ft.formats.keras_preset import MAP, VOCABULARY, WEIGHTS

_CREDENTIALS = (
    "Gemma's weights are behind a licence. Accept it on the model's page, "
    "then give credentials: KAGGLE_USERNAME and KAGGLE_KEY (or "
    "~/.kaggle/kaggle.json) for KerasHub presets and kaggle://, HF_TOKEN for "
    "hf://. A folder on disk needs none: --preset=FOLDER."
)
_NETWORK = (
    "The download failed: no network, or the server does not answer. "
    "Fetch the model elsewhere and pass --preset=FOLDER, or try the "
    f"embedded one: --preset={config.EMBEDDED_PRESET}."
)


def resolve(preset):
    """The folder that holds `preset`, or the name KerasHub loads it by."""
    if preset == config.EMBEDDED_PRESET:
        return embedded.preset_folder()
    if preset in keras_hub.models.GemmaBackbone.presets:
        return preset
    if preset.startswith("kaggle://"):
        return preset
    if preset.startswith("hf://"):
        return download(preset)
    folder = pathlib.Path(preset).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        place = folder if folder.is_dir() else folder.parent
        inside = sorted(p.name for p in place.iterdir())
        if any(name.endswith(".gguf") for name in (folder.name, *inside)):
            raise config.UserError(
                f"--preset={preset}: GGUF is a format for programs that run a "
                f"model; it cannot be trained. Take the model that it was made "
                f"of: --preset=hf://google/gemma-2-2b, for example, with "
                f"--model.quantize=nf4 if it has to be small."
            )
        raise config.UserError(
            f"--preset={preset} has no config.json, so it is neither a Keras "
            f"preset nor a Hugging Face model. It holds: {', '.join(inside[:8])}."
        )
    known = [config.EMBEDDED_PRESET] + [
        name
        for name in keras_hub.models.GemmaBackbone.presets
        if "gemma2" in name
    ]
    raise config.UserError(
        f"--preset={preset}: no such preset or folder."
        f"{config.preset_hint(preset, known)} Known: {', '.join(known)}; or "
        f"a folder, hf://owner/name, kaggle://owner/model/keras/variant."
    )


def folder(preset):
    """The local folder of `preset`, fetched where it is not here.

    KerasHub's names and kaggle:// are fetched file by file, as KerasHub does
    it, so that both find the same files.
    """
    source = resolve(preset)
    if isinstance(source, pathlib.Path):
        return source
    fetch = functools.partial(_fetch, preset, source)
    place = fetch("config.json").parent
    fetch(VOCABULARY)
    try:
        listed = huggingface.read_json(fetch(MAP))["weight_map"]
    except config.UserError:  # No map: the weights are one file.
        fetch(WEIGHTS)
        return place
    files = [[f] if isinstance(f, str) else f for f in listed.values()]
    for file in sorted({name for some in files for name in some}):
        fetch(file)
    return place


def _fetch(preset, source, file):
    """One file of a KerasHub name or kaggle:// handle, here or downloaded."""
    import kagglehub

    known = keras_hub.models.GemmaBackbone.presets.get(source)
    handle = known["kaggle_handle"] if known else source
    handle = handle.removeprefix("kaggle://")
    try:
        return pathlib.Path(kagglehub.model_download(handle, file))
    except Exception as error:
        said = cure(source, error)
        if said is None:
            raise
        raise config.UserError(f"--preset={preset}: {said}") from None


def sizes(preset):
    """dict as of `GemmaBackbone.get_config()` of a preset, without weights."""
    source = resolve(preset)
    if not isinstance(source, pathlib.Path):
        file = _fetch(preset, source, "config.json")
        return huggingface.read_json(file)["config"]
    settings = huggingface.read_json(source / "config.json")
    if is_huggingface(source):
        return huggingface.backbone_config(settings)
    return settings["config"]


def is_huggingface(source):
    """Whether what `resolve` gave is a folder in Hugging Face's format."""
    return isinstance(source, pathlib.Path) and huggingface.is_huggingface(
        source
    )


_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "*.h5",
    "assets/*",
)


def download(handle, files=_FILES):
    """The local folder of an `hf://owner/name`, fetched where it is not.

    Args:
        handle: hf://owner/name.
        files: glob patterns of what is fetched.
    """
    import huggingface_hub
    from huggingface_hub import errors

    fetch = functools.partial(
        huggingface_hub.snapshot_download,
        handle.removeprefix("hf://"),
        allow_patterns=list(files),
    )
    try:
        return pathlib.Path(fetch())
    except (errors.GatedRepoError, errors.LocalTokenNotFoundError) as error:
        raise config.UserError(
            f"--preset={handle}: {type(error).__name__}. {_CREDENTIALS}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise config.UserError(
            f"--preset={handle}: no such model, or it is private. "
            f"{_CREDENTIALS}"
        ) from None
    except errors.HFValidationError as error:
        raise config.UserError(
            f"--preset={handle}: {error}. Expected hf://owner/name."
        ) from None
    except Exception as error:
        if _is_full(error):
            raise config.UserError(
                f"--preset={handle}: {_no_room(handle, _size(fetch))}"
            ) from None
        if not isinstance(error, (errors.LocalEntryNotFoundError, OSError)):
            raise
        # Not its text: the address in it may be signed.
        code = getattr(getattr(error, "response", None), "status_code", "")
        raise config.UserError(
            f"--preset={handle}: {type(error).__name__} {code}. {_NETWORK}"
        ) from None


# KerasHub says "permissions" where Kaggle said 403 or 404.
_DENIED = ("401", "403", "credentials", "not accessible", "permissions to")


def cure(source, error):
    """What to do about a failed download or load; None if it is our bug."""
    text, module = f"{type(error).__name__}: {error}", type(error).__module__
    local = isinstance(source, pathlib.Path)
    if not local and _is_full(error):
        known = keras_hub.models.GemmaBackbone.presets.get(source)
        # Of a Kaggle handle nothing is known; weights take 16 bits at least.
        wanted = 2 * known["metadata"]["params"] if known else 0
        return _no_room(source, wanted)
    if not local and any(word in text for word in _DENIED):
        return f"no such model, or no access to it. {_CREDENTIALS}"
    if isinstance(error, FileNotFoundError):
        return (
            f"{text} A Keras preset holds config.json, model.weights.h5 (or "
            f"shards and model.weights.json) and assets/. Fetch it again."
        )
    if module.startswith(("requests", "urllib", "httpx")):
        return _NETWORK
    if isinstance(error, (ConnectionError, TimeoutError)):
        return _NETWORK
    # h5py raises a bare OSError for a truncated file.
    if isinstance(error, OSError) or module.startswith("kagglehub"):
        return f"a file of the preset cannot be read ({text}). Fetch it again."
    known = isinstance(error, (ValueError, KeyError, TypeError))
    return str(error) if known else None


def _is_full(error):
    """Whether a full disk is among an error and what led to it."""
    while error is not None:
        if atomic.is_full(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_room(preset, wanted):
    """What is said of a download that a full disk ended.

    Args:
        preset: an `hf://` or `kaggle://` handle, or a KerasHub preset.
        wanted: bytes that it takes; 0 where that is not known.
    """
    import huggingface_hub

    folder, name = huggingface_hub.constants.HF_HUB_CACHE, "HF_HOME"
    if not preset.startswith("hf://"):
        name = "KAGGLEHUB_CACHE"
        folder = os.environ.get(name, "~/.cache/kagglehub")
    place = pathlib.Path(folder).expanduser() / preset.rpartition("//")[2]
    return (
        f"the disk is full. {atomic.NoRoom(place, wanted).strerror}. Make room "
        f"and type the same command again, or set {name} to a folder on "
        f"another disk."
    )


def _size(fetch):
    """Bytes that `fetch` has yet to bring; 0 where the hub does not say."""
    try:
        files = fetch(dry_run=True)
        return sum(file.file_size for file in files if file.will_download)
    except Exception:  # The disk is full: that is told, whatever comes now.
        return 0
