"""Writing that is complete or absent: a file or a folder, never half of one.

POSIX `rename` within one folder is atomic, so everything is written under a
hidden sibling name and renamed when whole.
"""

import contextlib
import os
import pathlib
import shutil


@contextlib.contextmanager
def replacing(final):
    """Give a path to write to; rename it to `final` when the block succeeds.

    The block creates a file or a folder at the path it is given. When it
    raises, what it wrote is removed and `final` is as it was before.

    Args:
        final: the name under which the file or folder is to appear.

    Yields:
        `pathlib.Path` of a sibling of `final` that does not exist yet.
    """
    final = pathlib.Path(final)
    partial = final.with_name(f".{final.name}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        _sync(partial)
        _swap(partial, final)
        _sync_one(final.parent)
    except BaseException:
        _remove(partial)
        raise


def _swap(partial, final):
    if not (partial.is_dir() and final.is_dir()):
        os.replace(partial, final)
        return
    # rename refuses a folder that is not empty: the old one steps aside.
    old = final.with_name(f".{final.name}.old")
    _remove(old)
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    _remove(old)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path):
    for child in path.iterdir() if path.is_dir() else ():
        _sync(child)
    _sync_one(path)


def _sync_one(path):
    # Without it a power cut may keep the new name and lose the bytes.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
