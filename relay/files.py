"""Files: their state, their replacement, and those that nobody else should read (flags, events).

Only the relay's user can read private files, unless their directory is shared with its group and
with nobody else. The image's `/data` is shared with group 0 in this way: platforms such as
OpenShift run every container as an arbitrary user, and the next one may get another.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FileState = tuple[int, int, int]
"""Modification time in nanoseconds, size, and inode (editors replace files)."""

_SHARED = stat.S_IRWXU | stat.S_IRWXG

_PUBLIC = 0o666
"""Permissions of files for others, before the umask."""


def make_directory(path: Path) -> None:
    """Create a directory and its parents, as private as the closest existing one.

    Raises:
        OSError: it cannot be created, or is a file.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent)
    mode = _SHARED if _is_shared(path.parent) else stat.S_IRWXU
    # A later chmod would clear the set-group-ID bit for a user outside the directory's group. The
    # process-wide umask does no harm here: the relay gives every file an explicit mode.
    mask = os.umask(stat.S_IRWXO)
    try:
        path.mkdir(mode, exist_ok=True)
    finally:
        os.umask(mask)


def open_private(path: Path, flags: int) -> int:
    """Open a file, created as private as its directory, and return its descriptor.

    Args:
        path: path of the file.
        flags: flags of `os.open`.

    Raises:
        OSError: the file cannot be opened.
    """
    existed = path.exists()
    descriptor = os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR)
    if not existed and _is_shared(path.parent):
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
    return descriptor


@contextmanager
def replacing(path: Path, *, private: bool = True) -> Iterator[BinaryIO]:
    """Write a file, which takes the place of the one at `path` when the block ends.

    Nobody reads a part of it. If the block fails, the former file stays.

    Args:
        path: path of the file.
        private: False for a file that whoever the umask allows may read.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = open_private(temporary, flags) if private else os.open(temporary, flags, _PUBLIC)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # The lock tells `remove_unfinished` that this process is alive.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(descriptor)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_private(path: Path, content: bytes) -> None:
    """Replace the content of a private file at once, as `replacing`.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of files to be at `path`; living ones hold a lock."""
    for leftover in path.parent.glob(f"{glob.escape(path.stem)}.*.tmp"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; ignored where directories cannot be synchronised."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_shared(directory: Path) -> bool:
    """Return whether a directory is accessible to its owner and group, and to nobody else."""
    return stat.S_IMODE(directory.stat().st_mode) & 0o777 == _SHARED


def file_state(path: Path) -> FileState | None:
    """Return the state of a file, by which changes are noticed; None if it cannot be accessed."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
