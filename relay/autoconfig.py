"""Automatic configuration: LaunchDarkly says which environments exist, with which keys."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any

from relay import clock
from relay.environment import ConnectionState, Environment, UpstreamConnection
from relay.errors import ErrorKind, InvalidData
from relay.model.environment import EnvironmentSpec
from relay.protocol.autoconfig import (
    Delete,
    FilterDescription,
    ListChange,
    Message,
    Put,
    Upsert,
    VersionedList,
)
from relay.protocol.environments import (
    EnvironmentDescription,
    SharedSettings,
    ignored_expiry,
    rotations,
    spec_of,
    variant_name,
)
from relay.relay import DirectoryChange, Relay
from relay.sources import DataSource, Interrupted, UpToDate
from relay.sources.autoconfig import AutoConfigStream
from relay.telemetry.log import Log, local_time, mask_keys
from relay.telemetry.outage import OutageLog

_log = logging.getLogger("relay.autoconfig")


class _PrefixedLog(logging.LoggerAdapter[logging.Logger]):
    """Log whose lines begin as ld-relay's do."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"AutoConfiguration {msg}", kwargs


log = _PrefixedLog(_log, {})
"""Log of automatic configuration, for its stream as well."""

_TEXTS = {
    DirectoryChange.ADDED: "Added environment",
    DirectoryChange.CHANGED: "Properties have changed for environment",
    DirectoryChange.REMOVED: "Removed environment",
}


class AutoConfiguration:
    """Lets a relay have the environments that LaunchDarkly's stream describes.

    An outage of the stream, and a refused key, leave the environments as they are.

    Args:
        stream: to follow.
        settings: of all environments.
        make_environment: makes an environment.
        make_source: makes a data source for an environment that has a new SDK key.
    """

    def __init__(
        self,
        stream: AutoConfigStream,
        settings: SharedSettings,
        make_environment: Callable[[EnvironmentSpec], Environment],
        make_source: Callable[[EnvironmentSpec, Log], DataSource],
    ) -> None:
        self.is_upstream = True
        self.connection = UpstreamConnection()
        self.known = asyncio.Event()
        self.changes: Counter[DirectoryChange] = Counter()
        self._stream = stream
        self._settings = settings
        self._make_environment = make_environment
        self._make_source = make_source
        self._environments: VersionedList[EnvironmentDescription] = VersionedList()
        self._filters: VersionedList[FilterDescription] = VersionedList()
        self._outage = OutageLog(log)

    def __repr__(self) -> str:
        state = self.connection.state.value
        return f"<AutoConfiguration {state} {len(self._environments)} environments>"

    async def run(self, relay: Relay) -> None:
        """Follow the stream until cancelled."""
        log.info("Connecting to auto-configuration stream (%s)", self._stream.shown_url)
        async with aclosing(self._stream.updates()) as updates:
            async for update in updates:
                match update:
                    case Interrupted():
                        self._handle_interruption(update)
                    case UpToDate():
                        self._confirm()
                    case _:
                        await self._handle(relay, update)
                        self._confirm()

    async def _handle(self, relay: Relay, message: Message) -> None:
        match message:
            case Put():
                await self._put(relay, message)
            case Upsert(id=identifier, value=EnvironmentDescription() as environment):
                await self._apply(relay, self._environments.upsert(identifier, environment))
            case Delete(of=kind, id=identifier) if kind is EnvironmentDescription:
                await self._apply(relay, self._environments.delete(identifier, message.version))
            case Upsert(id=identifier, value=FilterDescription() as payload_filter):
                changes = self._filters.upsert(identifier, payload_filter)
                await self._apply_filters(relay, changes)
            case Delete(id=identifier):
                changes = self._filters.delete(identifier, message.version)
                await self._apply_filters(relay, changes)

    async def _put(self, relay: Relay, put: Put) -> None:
        log.info("Received configuration for %d environment(s)", len(put.environments))
        for reason in put.unusable.values():
            log.warning("%s", reason)
        mask_keys(_keys(put.environments.values()))  # at once, because each time costs
        await self._apply(relay, self._environments.put(put.environments, put.unusable))
        await self._apply_filters(relay, self._filters.put(put.filters, put.unusable))
        self.known.set()
        _log.info("Finished processing auto-configuration data")

    async def _apply(
        self, relay: Relay, changes: Iterable[ListChange[EnvironmentDescription]]
    ) -> None:
        """Carry out changes one by one; requests come in between, and no failure affects others.

        The variants of an environment follow it.
        """
        for change in changes:
            before, after = self._variants(change.before), self._variants(change.after)
            for payload_filter in before:
                if payload_filter not in after:
                    self._remove(relay, change.id, payload_filter)
            for payload_filter in after:
                if change.after is not None:
                    await self._attempt(relay, change.after, payload_filter)
            if change.after is not None and change.id not in relay.environments:
                self._environments.forget(change.id)  # so the next put is another chance

    async def _apply_filters(
        self, relay: Relay, changes: Iterable[ListChange[FilterDescription]]
    ) -> None:
        """Give each environment a variant for each filter of its project, and only these."""
        for change in changes:
            _report_filter(change)
            for each in self._environments.values():
                gone = change.before
                if gone and gone.key not in self._variants(each):
                    self._remove(relay, each.id, gone.key)
            await asyncio.sleep(0)
        # This includes variants that could not be made the last time.
        for each in self._environments.values():
            for payload_filter in self._variants(each):
                if variant_name(each.id, payload_filter) not in relay.environments:
                    await self._attempt(relay, each, payload_filter)

    def _variants(self, description: EnvironmentDescription | None) -> Sequence[str]:
        """Return the payload filters of an environment's variants; empty for itself, the first."""
        if description is None:
            return ()
        project = description.project_key
        keys = (each.key for each in self._filters.values() if each.project_key == project)
        return tuple(dict.fromkeys(("", *keys)))

    async def _attempt(
        self, relay: Relay, description: EnvironmentDescription, payload_filter: str
    ) -> None:
        try:
            self._carry_out(relay, description, payload_filter)
        except InvalidData as e:
            log.error("Environment data are not used: %s", e)  # noqa: TRY400 - a bug it is not
        except Exception:
            name = variant_name(description.id, payload_filter)
            log.exception('Unable to initialize auto-configured environment "%s"', name)
        await asyncio.sleep(0)

    def _remove(self, relay: Relay, environment_id: str, payload_filter: str) -> None:
        environment = relay.environments.get(variant_name(environment_id, payload_filter))
        if environment is not None:
            relay.remove(environment)
            self._report(DirectoryChange.REMOVED, environment.spec)

    def _carry_out(
        self, relay: Relay, description: EnvironmentDescription, payload_filter: str
    ) -> None:
        environment = relay.environments.get(variant_name(description.id, payload_filter))
        before = None if environment is None else environment.spec
        now = clock.now()
        spec = spec_of(description, self._settings, now, before, payload_filter)
        mask_keys(_keys([description]))
        if environment is None or before is None:
            relay.put(self._make_environment(spec))
            self._report(DirectoryChange.ADDED, spec)
        else:
            is_rotated = spec.sdk_key != before.sdk_key
            source = self._make_source(spec, environment.log) if is_rotated else None
            relay.change(environment, spec, source)
            self._report(DirectoryChange.CHANGED, spec)
            if not payload_filter:  # variants have the same keys
                self.changes[DirectoryChange.ROTATED] += is_rotated
                for line in rotations(before, spec, now):
                    _log.info(*_shown(line))
        told = ignored_expiry(description, before, now)
        if told is not None and not payload_filter:
            _log.warning(*_shown(told))

    def _report(self, change: DirectoryChange, spec: EnvironmentSpec) -> None:
        self.changes[change] += 1
        log.info("%s %s (%s)", _TEXTS[change], spec.name, spec.title)

    def _confirm(self) -> None:
        """Record that the list is current."""
        if not self.known.is_set():
            return  # a patch before the first put is not the list
        self.connection.has_data = True
        self.connection.last_confirmed = clock.monotonic()
        self.connection.enter(ConnectionState.VALID)
        self._outage.end("The auto-configuration stream works again")

    def _handle_interruption(self, outage: Interrupted) -> None:
        connection = self.connection
        connection.last_error = (outage.kind, clock.unix())
        connection.last_status = outage.status
        if outage.refused:
            state = ConnectionState.OFF
        elif connection.has_data:
            state = ConnectionState.INTERRUPTED
        else:
            state = ConnectionState.INITIALIZING
        again = connection.enter(state) or outage.kind is ErrorKind.INVALID_DATA
        if outage.refused:
            log.error("%s", outage.reason)  # each time: nothing else shows that it is tried again
            self._outage.reason = outage.reason
        else:
            self._outage.begin(outage.reason, "%s", outage.reason, again=again)


def _shown(line: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a log line and its arguments, with times for people."""
    return tuple(local_time(each) if isinstance(each, float) else each for each in line)


def _keys(descriptions: Iterable[EnvironmentDescription]) -> Iterable[str]:
    """Yield all keys of environments, which no log line may contain."""
    for each in descriptions:
        listed = [key for key, _ in (*each.sdk_keys, *each.mobile_keys)]
        expiring = [each.expiring[0]] if each.expiring else []
        yield from filter(None, (each.sdk_key, each.mobile_key, *expiring, *listed))


def _report_filter(change: ListChange[FilterDescription]) -> None:
    """Log a change of a payload filter; its variants have lines of their own."""
    payload_filter = change.after or change.before
    if payload_filter is not None and change.before != change.after:
        verb = "Removed" if change.after is None else "Changed" if change.before else "Added"
        project = payload_filter.project_key
        log.info('%s payload filter "%s" of project "%s"', verb, payload_filter.key, project)
