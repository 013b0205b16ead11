"""Reload: the configuration is read again, and what is new in it takes effect while all serve on.

What is new is made before anything changes. Environments that hand a credential on to one another
change in one turn of the event loop, so that it is refused at no time; all others one by one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from relay.aio import in_thread, wait_for
from relay.bigsegments.environment import Synchronising
from relay.config.difference import continued, difference, same
from relay.config.render import secrets
from relay.config.schema import Config
from relay.environment import Environment
from relay.errors import ConfigError
from relay.files import FileState, file_state
from relay.model.credential import MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.relay import Relay
from relay.sources import DataSource
from relay.stores import Mirror
from relay.stores.bigsegments import BigSegmentStore
from relay.telemetry.log import Log, mask_secrets, set_level
from relay.telemetry.reloads import ReloadResult

WATCH_INTERVAL = 2.0
"""Seconds between two looks at a configuration that is watched. It is read if the state of its
files has changed; a change takes effect when two readings agree, so that no file is used that is
still being written."""

OPTIONS = {
    "name": "name",
    "sdk_key": "sdkKey",
    "mobile_key": "mobileKey",
    "environment_id": "envId",
    "project_key": "projKey",
    "environment_key": "envKey",
    "secure_mode": "secureMode",
    "eval_streams": "evalStreams",
    "ttl": "ttl",
    "allowed_origins": "allowedOrigin",
    "allowed_headers": "allowedHeader",
    "prefix": "prefix",
    "table": "tableName",
    "log_level": "logLevel",
    "payload_filter": "filterKey",
}
"""Options of an environment by the attributes of its spec."""

_log = logging.getLogger("relay.reload")


class Certificate(Protocol):
    """Contract of the server's certificate."""

    def check(self) -> None:
        """Raise ConfigError if its files are unusable."""

    def renew(self) -> None:
        """Use what is in its files for the connections to come; raises ConfigError as well."""


class Parts(Protocol):
    """Contract of what makes environments, and what they need when they change."""

    def of(self, config: Config, *, databases: bool, documents: bool) -> Parts:
        """Return what makes environments with another configuration, databases or documents.

        Raises:
            ConfigError: a resource that it names is unusable.
        """

    @property
    def specs(self) -> Sequence[EnvironmentSpec]:
        """The specs of all environments that the configuration lists."""

    def environment(self, spec: EnvironmentSpec) -> Environment:
        """Return a new environment."""

    def keeps(self, environment: Environment, spec: EnvironmentSpec, *, databases: bool) -> bool:
        """Return whether an environment can go on with another spec, or must be made anew."""

    def source(self, spec: EnvironmentSpec, log: Log) -> DataSource:
        """Return a new data source of an environment."""

    def mirrors(
        self, environment: Environment, spec: EnvironmentSpec, *, databases: bool, documents: bool
    ) -> Sequence[Mirror] | None:
        """Return the mirrors of an environment with another spec, databases or documents.

        None if they stay.
        """

    def memberships(
        self, environment: Environment, spec: EnvironmentSpec, *, databases: bool
    ) -> tuple[BigSegmentStore, Synchronising | None] | None:
        """Return where big segments are from now on, and what fills it; None if they stay."""


class _Step(Struct, frozen=True):
    """Change of one environment, ready to be carried out.

    Args:
        environment: that changes.
        before: its spec so far; None if it is added.
        after: its spec from now on; None if it is removed.
        source: as `Relay.change` takes it.
        mirrors: as `Relay.change` takes them.
        memberships: where big segments are from now on, and what fills it; None if they stay.
    """

    environment: Environment
    before: EnvironmentSpec | None
    after: EnvironmentSpec | None
    source: DataSource | None = None
    mirrors: Sequence[Mirror] | None = None
    memberships: tuple[BigSegmentStore, Synchronising | None] | None = None

    def carry_out(self, relay: Relay) -> None:
        """Change the environments of a relay."""
        if self.after is None:
            relay.remove(self.environment)
        elif self.before is None:
            relay.put(self.environment)
        else:
            relay.change(self.environment, self.after, self.source, self.mirrors)
            if self.memberships and self.environment.big_segments:
                self.environment.big_segments.move(*self.memberships)

    @property
    def line(self) -> str:
        """The change for the log."""
        if self.after is None:
            return f"{_shown(self.environment.spec)} is removed"
        if self.before is None:
            return f"{_shown(self.after)} is added"
        options = ", ".join(_differences(self.before, self.after)) or "where it is stored"
        return f"{_shown(self.before)} has changed: {options}"


class _Problems(Struct, frozen=True):
    """Reading that has failed."""

    problems: tuple[str, ...]


_Reading = Config | _Problems

_Files = Sequence[tuple[str, FileState | None]]
"""Paths of files with their states; links are followed."""


class Reload:
    """Reads the configuration again, on request or when it has changed, and carries it out.

    Args:
        relay: to change.
        config: with which it was built.
        read: reads the configuration, in a thread; raises ConfigError.
        requested: is set when the configuration shall be read again.
        parts: makes environments; None if they are not those that the configuration lists.
        carry_out: is called with the configuration in force, for those who use options directly.
        certificate: of the server, which is renewed when its files change; None without TLS.
        interval: seconds between two looks at a configuration that is watched.
    """

    def __init__(
        self,
        relay: Relay,
        config: Config,
        read: Callable[[], Config],
        requested: asyncio.Event,
        *,
        parts: Parts | None = None,
        carry_out: Callable[[Config], None] = lambda _: None,
        certificate: Certificate | None = None,
        interval: float = WATCH_INTERVAL,
    ) -> None:
        self._relay = relay
        self._config = config
        self._read = read
        self._requested = requested
        self._parts = parts
        self._carry_out = carry_out
        self._certificate = certificate
        self._interval = interval
        self._last: _Reading = config
        """The reading that was carried out, or refused, last."""
        self._seen: _Reading = config
        """The last reading of a configuration that is watched."""
        self._read_files: _Files = ()
        """Files that need not be read again while they have this state; none if the last reading
        has not been confirmed."""

    def __repr__(self) -> str:
        return f"<Reload of {self._relay}>"

    async def run(self) -> None:
        """Reload until cancelled. A request that comes during a reload leads to another one."""
        self._report_watch()
        while True:
            if self._watches:
                await wait_for(self._requested, self._interval)
            else:
                await self._requested.wait()
            is_requested = self._requested.is_set()
            self._requested.clear()
            try:
                await self._reload(is_requested=is_requested)
            except Exception:  # noqa: BLE001 - the relay goes on as it is
                _log.exception("Configuration not reloaded because of an unexpected error")
                self._relay.reloads.count(ReloadResult.FAILURE)

    @property
    def _watches(self) -> bool:
        return self._config.main.reload == "watch"

    def _report_watch(self) -> None:
        if self._watches:
            _log.info("The configuration is watched, and reloaded when it has changed")

    async def _reload(self, *, is_requested: bool) -> None:
        files = await in_thread(partial(_files_of, self._seen), "reload")
        if files and files == self._read_files and not is_requested:
            return
        reading = await self._reading()
        is_steady, self._seen = _same(reading, self._seen), reading
        self._read_files = files if is_steady else ()
        if is_requested or (is_steady and not _same(reading, self._last)):
            before, self._last = self._last, reading
            if isinstance(reading, _Problems):
                self._refuse(reading)
            else:
                await self._take(reading, before)

    async def _reading(self) -> _Reading:
        try:
            return await in_thread(self._read, "reload")
        except ConfigError as e:
            return _Problems(e.problems)
        except Exception as e:  # noqa: BLE001 - a watched file may lead to it time and again
            _log.debug("The configuration could not be read", exc_info=True)
            # Without its text, which may quote a secret.
            return _Problems((f"it could not be read: {type(e).__name__}",))

    def _refuse(self, reading: _Problems) -> None:
        """Log everything that is wrong."""
        self._relay.reloads.count(ReloadResult.FAILURE)
        text = "Configuration not reloaded, nothing has changed; problems: %d"
        _log.error(text, len(reading.problems))
        for problem in reading.problems:
            _log.error("Configuration error: %s", problem)

    async def _take(self, config: Config, before: _Reading) -> None:
        """Carry out a configuration."""
        mask_secrets((*secrets(self._config), *secrets(config)))
        known = before.warnings if isinstance(before, Config) else ()
        for warning in config.warnings:
            if warning not in known:
                _log.warning("%s", warning)
        found = difference(self._config, config)
        parts = None
        steps: list[_Step] = []
        is_renewed = found.config.certificate != self._config.certificate
        certificate = self._certificate if is_renewed else None
        try:
            if certificate:
                await in_thread(certificate.check, "certificate")
            if self._parts is not None:
                stores, documents = found.stores, found.documents
                of = partial(self._parts.of, found.config, databases=stores, documents=documents)
                # In a thread, as it may have to load libraries and files.
                parts = await in_thread(of, "reload")
                steps = await self._steps(parts, databases=stores, documents=documents)
            if certificate:
                certificate.renew()
                _log.info("The certificate of the server is another one")
        except ConfigError as e:
            self._refuse(_Problems(e.problems))
            return
        watched = self._watches
        self._config, self._parts = found.config, parts
        set_level(found.config.main.log_level)
        if not watched:
            self._report_watch()
        self._carry_out(found.config)
        done = await self._carry_out_steps(steps, parts.specs if parts else ())
        if found.restart:
            options = ", ".join(found.restart)
            _log.warning("Not changed before the relay is restarted: %s", options)
        self._relay.reloads.count(ReloadResult.SUCCESS if done else ReloadResult.FAILURE)
        added = sum(step.before is None for step in steps)
        removed = sum(step.after is None for step in steps)
        text = "Configuration reloaded; environments added: %d, changed: %d, removed: %d"
        _log.info(text, added, len(steps) - added - removed, removed)

    async def _steps(self, parts: Parts, *, databases: bool, documents: bool) -> list[_Step]:
        """Return what makes the environments those of `parts`, with everything made that is new.

        Removals come first, because they free names and stores, additions last.

        Args:
            parts: of the new configuration.
            databases: True if the databases are others.
            documents: True if the places of documents are others.
        """
        specs = parts.specs
        environments = self._relay.environments
        goes_on = continued([each.spec for each in environments.values()], specs)
        kept = frozenset(goes_on.values())
        removed = [each for name, each in environments.items() if name not in kept]
        changes: list[_Step] = []
        additions: list[_Step] = []
        for spec in specs:
            environment = environments.get(goes_on.get(spec.name, ""))
            if environment is None:
                additions.append(_Step(parts.environment(spec), None, spec))
            elif not parts.keeps(environment, spec, databases=databases):
                removed.append(environment)
                additions.append(_Step(parts.environment(spec), None, spec))
            elif databases or documents or spec != environment.spec:
                before = environment.spec
                is_rotated = spec.sdk_key != before.sdk_key
                source = parts.source(spec, environment.log) if is_rotated else None
                mirrors = parts.mirrors(environment, spec, databases=databases, documents=documents)
                memberships = parts.memberships(environment, spec, databases=databases)
                changes.append(_Step(environment, before, spec, source, mirrors, memberships))
            await asyncio.sleep(0)
        return [*(_Step(each, each.spec, None) for each in removed), *changes, *additions]

    async def _carry_out_steps(
        self, steps: Sequence[_Step], specs: Sequence[EnvironmentSpec]
    ) -> bool:
        """Carry out steps; return whether all succeeded. A failure affects no other environment.

        First come, in one turn, those that hand on a name or a credential, then the others.
        """
        tied = _tied(steps, self._relay.environments.values())
        together = [step for step in steps if step.environment in tied]
        succeeded = [self._attempt(step) for step in together]
        if together:
            self._settle(specs)
        for step in steps:
            if step.environment not in tied:
                succeeded.append(self._attempt(step))
            _log.info("Environment %s", step.line)
            await asyncio.sleep(0)
        self._settle(specs)
        return all(succeeded)

    def _attempt(self, step: _Step) -> bool:
        try:
            step.carry_out(self._relay)
        except Exception:  # noqa: BLE001 - the boundary between environments
            _log.exception("Environment %s: this failed", step.line)
            return False
        return True

    def _settle(self, specs: Sequence[EnvironmentSpec]) -> None:
        """Let each credential open the last environment that has it, as after a start.

        In their order, because an environment that gets one back takes all others that it names.
        """
        registry = self._relay.registry
        last = {(each, s.payload_filter): s.name for s in specs for each in s.credentials}
        for spec in specs:
            environment = registry.environments.get(spec.name)
            lost = [
                each
                for each in spec.credentials
                if last[each, spec.payload_filter] == spec.name
                and registry.find(each.kind, each.value, spec.payload_filter) is not environment
            ]
            if lost and environment is not None and environment.spec == spec:
                self._relay.change(environment, spec)


def _tied(steps: Iterable[_Step], environments: Iterable[Environment]) -> frozenset[Environment]:
    """Return the environments that take a name or a credential of another, and these others."""
    owners = {each: one for one in environments for each in _possessions(one.spec)}
    tied: set[Environment] = set()
    for step in steps:
        for each in _possessions(step.after) if step.after else ():
            owner = owners.get(each, step.environment)
            if owner is not step.environment:
                tied |= {owner, step.environment}
    return frozenset(tied)


def _possessions(spec: EnvironmentSpec) -> Iterator[Hashable]:
    """Yield what one environment has at a time: its name, and its credentials."""
    yield spec.name
    for credential in spec.credentials:
        yield credential, spec.payload_filter


def _files_of(reading: _Reading) -> _Files:
    """Return the files that were read; none if they are not known."""
    files = reading.files if isinstance(reading, Config) else ()
    return [(path, file_state(Path(path))) for path in files]


def _same(one: _Reading, other: _Reading) -> bool:
    if isinstance(one, Config) and isinstance(other, Config):
        return same(one, other)
    return one == other


def _shown(spec: EnvironmentSpec) -> str:
    return f'"{spec.name}" (SDK key {spec.sdk_key.masked})'


def _differences(before: EnvironmentSpec, after: EnvironmentSpec) -> Iterator[str]:
    """Yield the options that differ, names and keys with their new value."""
    for attribute, option in OPTIONS.items():
        value = getattr(after, attribute)
        if value != getattr(before, attribute):
            if attribute == "name":
                yield f'{option} "{value}"'
            elif isinstance(value, SDKKey | MobileKey):
                yield f"{option} {value.masked}"
            else:
                yield option
