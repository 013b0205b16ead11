"""Reload: the configuration is read again, and what is new in it takes effect while all serve on.

What is new is made before anything changes, and then everything changes in one turn of the event
loop: no request sees a part of it, and a credential that moves is refused at no time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from msgspec import Struct

from relay.aio import in_thread, wait_for
from relay.config.difference import continued, difference, same
from relay.config.render import secrets
from relay.config.schema import Config, EnvironmentConfig, Main
from relay.environment import Environment
from relay.errors import ConfigError
from relay.model.credential import MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.relay import Relay
from relay.sources import DataSource
from relay.stores import Mirror
from relay.telemetry.log import Log, mask_secrets, set_level
from relay.telemetry.reloads import ReloadResult

WATCH_INTERVAL = 2.0
"""Seconds between two readings of a configuration that is watched. A change takes effect when two
readings agree, so that no file is used that is still being written."""

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
    "log_level": "logLevel",
    "payload_filter": "filterKey",
}
"""Options of an environment by the attributes of its spec."""

_log = logging.getLogger("relay.reload")


class Parts(Protocol):
    """Contract of what makes environments, and what they need when they change."""

    def spec(self, options: EnvironmentConfig, main: Main) -> EnvironmentSpec:
        """Return the spec of an environment that the configuration lists."""

    def environment(self, spec: EnvironmentSpec) -> Environment:
        """Return a new environment."""

    def source(self, spec: EnvironmentSpec, log: Log) -> DataSource:
        """Return a new data source of an environment."""

    def mirrors(self, environment: Environment, spec: EnvironmentSpec) -> Sequence[Mirror] | None:
        """Return the mirrors that an environment needs with a new spec; None if they stay."""


class _Change(Struct, frozen=True):
    """Change of an environment, ready to be carried out; as `Relay.change` takes it."""

    environment: Environment
    spec: EnvironmentSpec
    source: DataSource | None
    mirrors: Sequence[Mirror] | None


class _Plan(Struct, frozen=True):
    """Changes of all environments, ready to be carried out."""

    specs: Sequence[EnvironmentSpec]
    removed: Sequence[Environment]
    changed: Sequence[_Change]
    added: Sequence[Environment]


class _Problems(Struct, frozen=True):
    """Reading that has failed."""

    problems: tuple[str, ...]


_Reading = Config | _Problems


class Reload:
    """Reads the configuration again, on request or when it has changed, and carries it out.

    Args:
        relay: to change.
        config: with which it was built.
        read: reads the configuration, in a thread; raises ConfigError.
        requested: is set when the configuration shall be read again.
        parts: makes environments; None if they are not those that the configuration lists.
        carry_out: is called with the configuration in force, for those who use options directly.
        interval: seconds between two readings of a configuration that is watched.
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
        interval: float = WATCH_INTERVAL,
    ) -> None:
        self._relay = relay
        self._config = config
        self._read = read
        self._requested = requested
        self._parts = parts
        self._carry_out = carry_out
        self._interval = interval
        self._last: _Reading = config
        """The reading that was carried out, or refused, last."""
        self._seen: _Reading = config
        """The last reading of a configuration that is watched."""

    def __repr__(self) -> str:
        return f"<Reload of {self._relay}>"

    async def run(self) -> None:
        """Reload until cancelled. A request that comes during a reload leads to another one."""
        if self._watches:
            _log.info("The configuration is watched, and reloaded when it has changed")
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

    async def _reload(self, *, is_requested: bool) -> None:
        reading = await self._reading()
        is_steady, self._seen = _same(reading, self._seen), reading
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
        plan = await self._plan(found.config)
        self._config = found.config
        set_level(found.config.main.log_level)
        self._carry_out(found.config)
        self._change(plan)
        if found.restart:
            options = ", ".join(found.restart)
            _log.warning("Not changed before the relay is restarted: %s", options)
        self._relay.reloads.count(ReloadResult.SUCCESS)
        text = "Configuration reloaded; environments added: %d, changed: %d, removed: %d"
        _log.info(text, len(plan.added), len(plan.changed), len(plan.removed))

    async def _plan(self, config: Config) -> _Plan:
        """Make everything that the environments of a configuration need. Others run meanwhile."""
        parts, environments = self._parts, self._relay.environments
        if parts is None:
            return _Plan((), (), (), ())
        specs = [parts.spec(each, config.main) for each in config.all_environments]
        goes_on = continued([each.spec for each in environments.values()], specs)
        kept = frozenset(goes_on.values())
        removed = [each for name, each in environments.items() if name not in kept]
        changed: list[_Change] = []
        added: list[Environment] = []
        for spec in specs:
            environment = environments.get(goes_on.get(spec.name, ""))
            if environment is None:
                added.append(parts.environment(spec))
            elif spec != environment.spec:
                is_rotated = spec.sdk_key != environment.spec.sdk_key
                source = parts.source(spec, environment.log) if is_rotated else None
                mirrors = parts.mirrors(environment, spec)
                changed.append(_Change(environment, spec, source, mirrors))
            await asyncio.sleep(0)
        return _Plan(specs, removed, changed, added)

    def _change(self, plan: _Plan) -> None:
        """Carry out a plan, in one turn."""
        relay = self._relay
        for environment in plan.removed:
            relay.remove(environment)
            _log.info("Environment %s is removed", _shown(environment.spec))
        for each in plan.changed:
            before = each.environment.spec
            relay.change(each.environment, each.spec, each.source, each.mirrors)
            options = ", ".join(_differences(before, each.spec))
            _log.info("Environment %s has changed: %s", _shown(before), options)
        for environment in plan.added:
            relay.put(environment)
            _log.info("Environment %s is added", _shown(environment.spec))
        self._settle(plan.specs)

    def _settle(self, specs: Iterable[EnvironmentSpec]) -> None:
        """Let each credential open the last environment that has it, as after a start."""
        registry = self._relay.registry
        last = {(each, s.payload_filter): s.name for s in specs for each in s.credentials}
        for (credential, payload_filter), name in last.items():
            environment = registry.environments[name]
            holder = registry.find(credential.kind, credential.value, payload_filter)
            if holder is not environment:
                self._relay.change(environment, environment.spec)


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
