"""Files that hold what nobody else should read: flags, events and what contexts say.

They are the relay's alone, unless their directory is shared with its group, and with nobody else,
as `/data` of the image is with group 0: a platform that gives containers a user of its own choice,
such as OpenShift, may give the next container another one.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_SHARED = stat.S_IRWXU | stat.S_IRWXG


def make_directory(path: Path) -> None:
    """Make a directory and those above it, as private as the first that exists.

    Raises:
        OSError: it cannot be made, or is a file.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent)
    mode = _SHARED if _is_shared(path.parent) else stat.S_IRWXU
    # To change the mode later would take away that files in it belong to the directory's group,
    # for a user who is not in that. All that the relay makes has a mode of its own.
    mask = os.umask(stat.S_IRWXO)
    try:
        path.mkdir(mode, exist_ok=True)
    finally:
        os.umask(mask)


def open_private(path: Path, flags: int) -> int:
    """Return a descriptor of a file, made as private as its directory if there is none yet.

    Args:
        path: of the file.
        flags: of `os.open`.

    Raises:
        OSError: it cannot be opened.
    """
    existed = path.exists()
    descriptor = os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR)
    if not existed and _is_shared(path.parent):
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
    return descriptor


def _is_shared(directory: Path) -> bool:
    """Whether a directory is for its owner and its group, and for nobody else."""
    return stat.S_IMODE(directory.stat().st_mode) & 0o777 == _SHARED
