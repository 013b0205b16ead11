"""The list of environments in a file beside the snapshots, encrypted.

The automatic configuration key gives both the name of the file and the key that encrypts it, by a
function that cannot be reversed: whoever has the file learns nothing, and a relay with another key
does not find it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from relay.aio import in_thread
from relay.errors import InvalidData, StoreUnavailable
from relay.files import make_directory, remove_unfinished, write_private
from relay.model.credential import AutoConfigKey
from relay.protocol.environmentlist import EnvironmentList, entries_of, list_of
from relay.reasons import describe
from relay.stores.sealing import Seal, derived

MAX_SIZE = 64 * 1024 * 1024
"""Maximum size of a file in bytes: more than a hundred thousand environments."""

_FIRST_LINE = b"relay-environments 1\n"
"""Says what the file is, and in which form; sealed with the rest."""

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


class ListFile:
    """The file of one automatic configuration key.

    Args:
        directory: directory of the file; created with private permissions if missing.
        key: the automatic configuration key.
    """

    def __init__(self, directory: Path, key: AutoConfigKey) -> None:
        name = derived(key.value, "relay: name of the list of environments").hex()[:16]
        self.path = directory / f"environments-{name}.sealed"
        self._seal = Seal(derived(key.value, "relay: encryption of the list of environments"))

    def __repr__(self) -> str:
        return f"<ListFile {self.path}>"

    @property
    def label(self) -> str:
        """The file for log lines."""
        return f"file {self.path}"

    async def load(self) -> EnvironmentList | None:
        """Return the content; None if there is no file. Remove what killed processes have left.

        Raises:
            InvalidData: the content was altered, cut off, or written by another release.
            StoreUnavailable: the file cannot be read.
        """
        return await in_thread(self._load, "list")

    async def save(self, environments: EnvironmentList) -> None:
        """Replace the file at once.

        Raises:
            StoreUnavailable: it cannot be written; the former file stays.
        """
        await in_thread(lambda: self._save(environments), "list")

    async def aclose(self) -> None:
        """Do nothing: a file has no connection."""

    def _load(self) -> EnvironmentList | None:
        remove_unfinished(self.path)
        try:
            with self.path.open("rb") as file:
                first_line = file.read(len(_FIRST_LINE))
                sealed = file.read(MAX_SIZE)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreUnavailable(describe(e)) from e
        if first_line != _FIRST_LINE:
            raise InvalidData("file", "another release has written it, or it has been altered")
        content = self._seal.open(sealed, _FIRST_LINE)
        try:
            entries = _DECODER.decode(content)
        except msgspec.DecodeError as e:
            raise InvalidData("file", str(e)) from e
        return list_of({name: bytes(entry) for name, entry in entries.items()})

    def _save(self, environments: EnvironmentList) -> None:
        entries = {name: msgspec.Raw(entry) for name, entry in entries_of(environments).items()}
        sealed = self._seal.close(msgspec.json.encode(entries), _FIRST_LINE)
        try:
            make_directory(self.path.parent)
            write_private(self.path, _FIRST_LINE + sealed)
        except OSError as e:
            raise StoreUnavailable(describe(e)) from e
