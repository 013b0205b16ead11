"""Offline mode: the environments are those of an archive, read again whenever it changes.

(offline-and-autoconfig 7.3)
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from msgspec import Struct

from relay import clock
from relay.aio import run_in_slices
from relay.config.types import DURATION
from relay.environment import Environment, UpstreamConnection
from relay.errors import ErrorKind, InvalidData, UnusableArchive
from relay.files import FileState, file_state
from relay.model.environment import EnvironmentSpec
from relay.model.payload import ChangeSet
from relay.protocol import archive
from relay.protocol.archive import Entry, Metadata
from relay.protocol.environments import SharedSettings, spec_of
from relay.reasons import describe
from relay.relay import DirectoryChange, Relay
from relay.sources import Interrupted, UpToDate
from relay.sources.archive import ArchiveSource
from relay.steps import Steps, finish
from relay.telemetry.rotation import log_rotation

MAX_FILE = 1024 * 1024 * 1024
"""Maximum size of an archive in bytes."""

CONFIRM_EVERY = 10.0
"""Seconds between the confirmations that environments get while the archive is unchanged."""

MakeEnvironment = Callable[[EnvironmentSpec, ArchiveSource], Environment]

_log = logging.getLogger("relay.archive")


class _Loaded(Struct, frozen=True):
    """One environment of an archive, as far as it is usable.

    Args:
        metadata: None if they are unusable.
        data: None if they are unusable, or the ones that are served already.
        error: reason for which something is unusable; empty if nothing is.
    """

    metadata: Metadata | None = None
    data: ChangeSet | None = None
    error: str = ""


@dataclass(slots=True)
class _Served:
    """One environment of the relay, and the state that was taken of it last."""

    environment: Environment
    source: ArchiveSource
    version: int
    data_id: str | None = None
    """None if its data have never been usable."""
    broken: bool = False
    """True while the archive's state of it is unusable."""


class OfflineArchive:
    """Keeps the environments of a relay equal to those of an archive.

    An unusable archive changes nothing, nor does an unusable environment of a good one; each is
    reported once for each state of the file.

    Args:
        path: path of the archive.
        interval: seconds between two checks for a change.
        settings: of all environments.
        make_environment: makes an environment with its parts.
    """

    def __init__(
        self,
        path: Path,
        interval: float,
        settings: SharedSettings,
        make_environment: MakeEnvironment,
    ) -> None:
        self.is_upstream = False
        self.connection = UpstreamConnection()
        self.known = asyncio.Event()
        self.changes: Counter[DirectoryChange] = Counter()
        self.invalid_entries: Mapping[tuple[str, str], str] = {}
        self._settings = settings
        self._path = path
        self._interval = interval
        self._make = make_environment
        self._served: dict[str, _Served] = {}
        self._seen: FileState | None = None
        """State of the file at the last check; None if there was no file."""
        self._loaded: FileState | None = None
        """State of the file that is served."""
        self._confirmed = clock.monotonic()

    def __repr__(self) -> str:
        return f"<OfflineArchive {self._path} {len(self._served)} environments>"

    def load(self, relay: Relay) -> None:
        """Read the archive for the first time, before the relay runs.

        Raises:
            UnusableArchive: it cannot be read, or is broken.
        """
        self._seen = self._loaded = file_state(self._path)
        finish(self._apply(relay, _read(self._path, {})))
        self.known.set()
        text = "[FileDataSource] Monitoring data file %s for changes (every %s) %s"
        _log.info(text, self._path, DURATION.show(self._interval), _shown(self._seen))

    async def run(self, relay: Relay) -> None:
        """Read the archive whenever it changes, until cancelled."""
        self._seen = self._loaded  # what an unexpected error has left is tried again
        while True:
            await asyncio.sleep(self._interval)
            state = await asyncio.to_thread(file_state, self._path)
            if state != self._seen:
                self._seen = state
                await self._changed(relay, state)
            if self._seen == self._loaded:
                self._confirm()

    async def _changed(self, relay: Relay, state: FileState | None) -> None:
        if state is None:
            _log.error("[FileDataSource] Data file stat failed; file %s not found", self._path)
            relay.unusable_archive = f"file {self._path} not found", clock.unix()
            return
        if state == self._loaded:
            relay.unusable_archive = None
            return
        text = "[FileDataSource] Data file %s has changed %s"
        _log.info(text, self._path, _shown(state))
        known = {name: (each.version, each.data_id) for name, each in self._served.items()}
        try:
            loaded = await asyncio.to_thread(_read, self._path, known)
        except UnusableArchive as e:
            text = (
                "[FileDataSource] Data file reload failed; file is invalid or possibly incomplete"
            )
            _log.warning("%s (error: %s)", text, e)
            relay.unusable_archive = str(e), clock.unix()
            return
        _log.warning("[FileDataSource] Reloaded data from %s", self._path)
        await run_in_slices(self._apply(relay, loaded))
        self._loaded = state
        relay.unusable_archive = None

    def _confirm(self) -> None:
        """Let the environments know now and then that their data are current."""
        if clock.monotonic() - self._confirmed < CONFIRM_EVERY:
            return
        self._confirmed = clock.monotonic()
        for served in self._served.values():
            if not served.broken:
                served.source.give(UpToDate())

    def _apply(self, relay: Relay, loaded: Mapping[str, _Loaded]) -> Steps[None]:
        """Let a relay have the environments of an archive, and no others."""
        if not loaded:
            text = "The data file does not contain any environments; check your configuration"
            _log.warning("[FileDataSource] %s", text)
        relay.unusable.clear()
        for name, each in loaded.items():
            if each.error:
                self._spoil(relay, name, each)
            elif each.metadata is not None:
                self._put(relay, name, each.metadata, each.data)
            yield
        for name in self._served.keys() - loaded.keys():
            environment = self._served.pop(name).environment
            text = "[FileDataSource] Removed environment %s (%s)"
            _log.info(text, name, environment.spec.title)
            relay.remove(environment)
            self.changes[DirectoryChange.REMOVED] += 1
            yield

    def _spoil(self, relay: Relay, name: str, loaded: _Loaded) -> None:
        """Keep the present state of an environment; a new one has no data, but its keys."""
        text = "Found invalid data for environment"
        _log.error(
            "[FileDataSource] %s %s; skipping this environment (%s)", text, name, loaded.error
        )
        if name not in self._served:
            if loaded.metadata is None:
                relay.unusable[name] = loaded.error
                return
            self._add(relay, name, loaded.metadata)
        served = self._served[name]
        served.broken = True
        reason = f"The archive is unusable for this environment: {loaded.error}"
        served.source.give(Interrupted(ErrorKind.INVALID_DATA, reason))

    def _put(self, relay: Relay, name: str, metadata: Metadata, data: ChangeSet | None) -> None:
        """Add an environment, or change it if its version or the name of its data has changed."""
        served = self._served.get(name)
        if served is None:
            served = self._add(relay, name, metadata)
        elif (served.version, served.data_id) != _state_of(metadata):
            environment, before = served.environment, served.environment.spec
            spec = spec_of(metadata.environment, self._settings, clock.now(), before)
            relay.change(environment, spec)
            self.changes[DirectoryChange.CHANGED] += 1
            self.changes[DirectoryChange.ROTATED] += spec.sdk_key != before.sdk_key
            _log.info("[FileDataSource] Updated environment %s (%s)", name, spec.title)
            log_rotation(_log, metadata.environment, before, spec)
        served.version, served.data_id = _state_of(metadata)
        served.broken = False
        served.source.give(data or UpToDate())

    def _add(self, relay: Relay, name: str, metadata: Metadata) -> _Served:
        spec = spec_of(metadata.environment, self._settings, clock.now())
        source = ArchiveSource()
        served = _Served(self._make(spec, source), source, metadata.environment.version)
        relay.put(served.environment)
        self._served[name] = served
        self.changes[DirectoryChange.ADDED] += 1
        _log.info("[FileDataSource] Added environment %s (%s)", name, spec.title)
        log_rotation(_log, metadata.environment, None, spec)
        return served


def _read(path: Path, known: Mapping[str, tuple[int, str | None]]) -> dict[str, _Loaded]:
    """Return the environments of an archive by name.

    Args:
        path: path of the archive.
        known: versions and names of the data that are served.

    Raises:
        UnusableArchive: it cannot be read, or is broken.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError as e:
        text = f"unable to read file data source {path}: stat {path}: no such file or directory"
        raise UnusableArchive(text) from e
    except IsADirectoryError as e:
        raise UnusableArchive(f"read {path}: is a directory") from e
    except OSError as e:
        text = f"unable to read file data source {path}: {describe(e)}"
        raise UnusableArchive(text) from e
    if len(content) > MAX_FILE:
        raise UnusableArchive(f"{path} is longer than {MAX_FILE} bytes")
    return {each.name: _understood(each, known.get(each.name)) for each in archive.read(content)}


def _understood(entry: Entry, known: tuple[int, str | None] | None) -> _Loaded:
    """Return an environment of an archive; its data only if they are not served already."""
    metadata = None
    try:
        metadata = entry.metadata()
        same_data = known is not None and known[1] == metadata.data_id
        return _Loaded(metadata, None if same_data else entry.data())
    except InvalidData as e:
        return _Loaded(metadata, error=str(e))


def _state_of(metadata: Metadata) -> tuple[int, str]:
    return metadata.environment.version, metadata.data_id


def _shown(state: FileState | None) -> str:
    if state is None:
        return ""
    mtime, size, _ = state
    return f"(size={size}, mtime={formatdate(mtime / 1e9, usegmt=True)})"
