"""Uploads exports to the Hugging Face hub or to Kaggle.

Credentials come from the environment, never from a setting: a flag would stand
in the shell's history and in config.json.
"""

import re

from keras_gemma_ft import config, runtime

_HUB = re.compile(r"hf://([\w.\-]+/[\w.\-]+)")
_KAGGLE = re.compile(r"kaggle://([\w.\-]+/[\w.\-]+/[\w.\-]+/[\w.\-]+)")
_CURES = {
    "hf": (
        "Set HF_TOKEN to a token that may write "
        "(https://huggingface.co/settings/tokens)."
    ),
    "kaggle": (
        "Set KAGGLE_USERNAME and KAGGLE_KEY, or put ~/.kaggle/kaggle.json in "
        "place (https://www.kaggle.com/settings)."
    ),
}


def check(target):
    """UserError if `--export.push_to` is no address."""
    if target and not (_HUB.fullmatch(target) or _KAGGLE.fullmatch(target)):
        raise config.UserError(
            f"--export.push_to={target}: expected hf://owner/name, or "
            f"kaggle://owner/model/framework/variation."
        )


def push(target, places):
    """Uploads folders, one format to the root, several to a folder each.

    Args:
        target: see `check`. What is not there yet is made, and is private.
        places: {format: folder}.

    Returns:
        The address of what was uploaded.

    Raises:
        UserError: no credentials, no access or no network; what was exported
            stays where it is.
    """
    upload = _to_hub if target.startswith("hf://") else _to_kaggle
    name = target.partition("://")[2]
    try:
        address = upload(name, places)
    except Exception as error:
        raise config.UserError(_cure(target, error, places)) from None
    runtime.say(f"uploaded to {address}")
    return address


def _to_hub(name, places):
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    hub.create_repo(name, private=True, exist_ok=True)
    for what, folder in places.items():
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            path_in_repo=what if len(places) > 1 else None,
            commit_message=f"keras_gemma_ft: {what}",
        )
    return f"{hub.endpoint}/{name}"


def _to_kaggle(name, places):
    import kagglehub

    for what, folder in places.items():
        handle = f"{name}-{what}" if len(places) > 1 else name
        # Kaggle's names know no underscore.
        handle = handle.replace("_", "-")
        kagglehub.model_upload(
            handle, str(folder), license_name="Gemma", version_notes=what
        )
    return f"https://www.kaggle.com/models/{'/'.join(name.split('/')[:2])}"


def _cure(target, error, places):
    """What is said of a failed upload, without the text of the error.

    The address in it may hold a token.
    """
    kind = target.partition("://")[0]
    code = getattr(getattr(error, "response", None), "status_code", "")
    said = f"--export.push_to={target}: {type(error).__name__} {code}".rstrip()
    module = type(error).__module__.partition(".")[0]
    if code in (401, 403, 404) or "Credential" in said or "Token" in said:
        said += f": not allowed, or no credentials. {_CURES[kind]}"
    elif isinstance(error, OSError) or module.startswith(("httpx", "requests")):
        said += (
            f": no network, or the server does not answer. {_CURES[kind]} "
            f"HF_HUB_OFFLINE must not be set."
        )
    else:
        said += f": {str(error).partition(chr(10))[0][:200]}"
    folders = ", ".join(map(str, places.values()))
    return f"{said} What was exported is in {folders}; push it again later."
