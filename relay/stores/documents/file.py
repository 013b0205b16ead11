"""A folder as a place for documents. Files are replaced as a whole, so readers never see a part.

They are readable by whoever the process's umask allows: they are made for others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from relay import clock
from relay.aio import in_thread
from relay.errors import StoreUnavailable
from relay.files import remove_unfinished, replacing
from relay.protocol.document import MAX_SIZE
from relay.reasons import describe
from relay.stores.documents import DocumentChanged
from relay.stores.documents.location import Location

MAX_WAIT = 5.0
"""Seconds to wait while other relays write into the folder, before that counts as a failure."""

_POLL = 0.02
"""Seconds between two attempts to lock a folder."""

_ONE_WRITER = threading.Lock()
"""Serialises the writes of this process: environments share the disk."""


class FilePlace:
    """A file with a document. Its tag is made of modification time, size and inode.

    Args:
        location: address of the file.
    """

    def __init__(self, location: Location) -> None:
        self.url = location.masked
        self.in_gzip = location.in_gzip
        self._path = Path(location.path)

    def __repr__(self) -> str:
        return f"<FilePlace {self._path}>"

    async def read(self) -> tuple[bytes, str] | None:
        """Return the content and its tag; None if there is no file.

        Raises:
            StoreUnavailable: the file cannot be read, or is too long.
        """
        with _translated_errors():
            return await in_thread(self._read, "documents")

    async def is_unchanged(self, tag: str | None) -> bool:
        """Return whether the file is still the one of this tag.

        Raises:
            StoreUnavailable: its folder cannot be read.
        """
        with _translated_errors():
            return await in_thread(self._tag, "documents") == tag

    async def write(self, content: bytes, tag: str | None) -> str:
        """Replace the file; return the new tag.

        Raises:
            DocumentChanged: somebody else has replaced it.
            StoreUnavailable: it cannot be written, or another process is about to.
        """
        with _translated_errors():
            return await in_thread(lambda: self._replace(content, tag), "documents")

    async def aclose(self) -> None:
        """Do nothing: no file is left open."""

    def _read(self) -> tuple[bytes, str] | None:
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_size > MAX_SIZE:
                    raise StoreUnavailable(f"the file is longer than {MAX_SIZE} bytes")
                return file.read(), _tag_of(state)
        except FileNotFoundError:
            return None

    def _tag(self) -> str | None:
        try:
            return _tag_of(self._path.stat())
        except FileNotFoundError:
            return None

    def _replace(self, content: bytes, tag: str | None) -> str:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with _ONE_WRITER, _lock(folder):
            remove_unfinished(self._path)
            if self._tag() != tag:
                raise DocumentChanged
            with replacing(self._path, private=False) as file:
                file.write(content)
                file.flush()
                return _tag_of(os.fstat(file.fileno()))


def _tag_of(state: os.stat_result) -> str:
    return f"{state.st_mtime_ns}-{state.st_size}-{state.st_ino}"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other relays from writing into a folder, if its file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    deadline, pause = clock.monotonic() + MAX_WAIT, threading.Event()
    try:
        while not _try_to_lock(descriptor):
            if clock.monotonic() > deadline:
                raise StoreUnavailable("another process writes there and does not end")
            pause.wait(_POLL)
        yield
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    """Lock a file; return False if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # there are no locks here; a rename is atomic all the same
    return True


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StoreUnavailable(describe(e)) from e
