"""Writing that is complete or absent: a file or a folder, never half of one.

POSIX `rename` within one folder is atomic, so everything is written under a
hidden sibling name and renamed when whole.
"""

import contextlib
import errno
import os
import pathlib
import shutil

# No room on the disk, in the user's quota, or below a limit on files' sizes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(OSError):
    """A file could not be written, because there is no room for it.

    Attributes:
        wanted: bytes that were to be written; 0 where that is not known.
        free: bytes that are free on the disk.
    """

    def __init__(self, final, wanted=0, why="No space left on device"):
        folder = _nearest(final)
        self.wanted, self.free = wanted, shutil.disk_usage(folder).free
        wants = f"takes {wanted:,} bytes" if wanted else "does not fit"
        super().__init__(
            errno.ENOSPC,
            f"{final} {wants}; {self.free:,} bytes are free in {folder} "
            f"({why})",
        )


def is_full(error):
    """Whether an exception says that there was no room."""
    # HDF5, and libraries in Rust, have it in the message only.
    number = getattr(error, "errno", None)
    return number in _FULL or "No space left on device" in str(error)


def check_room(final, wanted):
    """Raises `NoRoom` if `wanted` bytes for `final` are not free."""
    if shutil.disk_usage(_nearest(final)).free < wanted:
        raise NoRoom(final, wanted)


def _nearest(path):
    """The folder that holds `path`, or the nearest one that exists."""
    return next(p for p in pathlib.Path(path).absolute().parents if p.is_dir())


@contextlib.contextmanager
def replacing(final, wanted=0):
    """Give a path to write to; rename it to `final` when the block succeeds.

    The block creates a file or a folder at the path it is given. When it
    raises, what it wrote is removed and `final` is as it was before.

    Args:
        final: the name under which the file or folder is to appear.
        wanted: bytes that will be written, if they are known: where they are
            not free, nothing is begun.

    Yields:
        `pathlib.Path` of a sibling of `final` that does not exist yet.

    Raises:
        NoRoom: the disk is full.
    """
    final = pathlib.Path(final)
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        check_room(final, wanted)
        yield partial
        _sync(partial)
        _swap(partial, final)
        _sync_one(final.parent)
    except BaseException as error:
        _remove(partial)
        full = isinstance(error, OSError) and is_full(error)
        if full and not isinstance(error, NoRoom):
            raise NoRoom(final, wanted, error.strerror or error) from error
        raise


def append(path, data):
    """Adds bytes to the end of a file: all of them, or none.

    Raises:
        NoRoom: the disk is full.
    """
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            file.truncate(before)
            if is_full(error):
                raise NoRoom(path, len(data), error.strerror) from error
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
