"""Automatic configuration: LaunchDarkly says which environments exist, with which keys."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any

from relay import clock
from relay.environment import CONFIRM_EVERY, ConnectionState, Environment, UpstreamConnection
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
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import (
    EnvironmentDescription,
    SharedSettings,
    settled,
    spec_of,
    variant_name,
)
from relay.reasons import describe
from relay.relay import RESTART_DELAY, DirectoryChange, Relay
from relay.sources import DataSource, Interrupted, UpToDate
from relay.sources.autoconfig import AutoConfigStream
from relay.stores.listmirror import ListMirror
from relay.telemetry.log import Log, local_time, mask_keys
from relay.telemetry.outage import OutageLog
from relay.telemetry.rotation import log_rotation

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

    An outage of the stream, and a refused key, leave the environments as they are. Until the stream
    delivers, the stored list is served, and `known` is not set: LaunchDarkly may know more.

    Args:
        stream: to follow.
        settings: of all environments.
        make_environment: makes an environment.
        make_source: makes a data source for an environment that has a new SDK key.
        mirrors: places where the list is stored.
    """

    def __init__(
        self,
        stream: AutoConfigStream,
        settings: SharedSettings,
        make_environment: Callable[[EnvironmentSpec], Environment],
        make_source: Callable[[EnvironmentSpec, Log], DataSource],
        mirrors: Sequence[ListMirror] = (),
    ) -> None:
        self.is_upstream = True
        self.connection = UpstreamConnection()
        self.known = asyncio.Event()
        self.changes: Counter[DirectoryChange] = Counter()
        self.invalid_entries: dict[tuple[str, str], str] = {}
        self._stream = stream
        self._settings = settings
        self._make_environment = make_environment
        self._make_source = make_source
        self._environments: VersionedList[EnvironmentDescription] = VersionedList()
        self._filters: VersionedList[FilterDescription] = VersionedList()
        self._mirrors = tuple(mirrors)
        self._settled: dict[str, EnvironmentDescription] = {}
        """Stored form of each environment, by ID."""
        self._stored: EnvironmentList | None = None
        """The stored list that is served until the stream delivers; None without one."""
        self._mirrors_updated_at = -float("inf")
        """Monotonic time of the last `update` of the mirrors."""
        self._lock = asyncio.Lock()
        """Held while a list or a message is carried out, which takes many turns."""
        self._outage = OutageLog(log)

    def __repr__(self) -> str:
        state = self.connection.state.value
        return f"<AutoConfiguration {state} {len(self._environments)} environments>"

    async def run(self, relay: Relay) -> None:
        """Serve the stored list, follow the stream and store what it says until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for mirror in self._mirrors:
                tasks.create_task(self._load_stored(relay, mirror))
                tasks.create_task(self._keep_stored(mirror))
            tasks.create_task(self._follow_stream(relay))

    async def _load_stored(self, relay: Relay, mirror: ListMirror) -> None:
        """Serve a stored list until the stream delivers; the newer of two lists wins."""
        try:
            stored = await mirror.load(self.known)
        except Exception:
            log.exception("The stored list of environments failed to be read")
            return
        if stored is None:
            return
        async with self._lock:
            if self.known.is_set() or not _is_newer(stored, self._stored):
                return
            age = None if stored.confirmed is None else max(0.0, clock.unix() - stored.confirmed)
            when = "at an unknown time" if age is None else local_time(clock.unix() - age)
            text = "Serving the stored list of %d environment(s), last confirmed %s"
            log.info(text, len(stored.environments), when)
            self._stored = stored
            if age is not None:
                self.connection.last_confirmed = clock.monotonic() - age
            await self._take(relay, Put(stored.environments, stored.filters))

    async def _keep_stored(self, mirror: ListMirror) -> None:
        """Store the list, and begin anew after any exception, which affects nothing else."""
        while True:
            try:
                await mirror.run(self._current)
            except Exception:
                log.exception("The list of environments failed to be stored; trying again")
            await asyncio.sleep(RESTART_DELAY)

    async def _follow_stream(self, relay: Relay) -> None:
        log.info("Connecting to auto-configuration stream (%s)", self._stream.shown_url)
        async with aclosing(self._stream.updates()) as updates:
            async for update in updates:
                match update:
                    case Interrupted():
                        self._handle_interruption(update)
                    case UpToDate():
                        self._confirm()
                    case _:
                        async with self._lock:
                            await self._handle(relay, update)
                        self._confirm(changed=True)

    async def _handle(self, relay: Relay, message: Message) -> None:
        match message:
            case Put():
                await self._put(relay, message)
            case Upsert(id=identifier, value=EnvironmentDescription() as environment):
                self.invalid_entries.pop(("environment", identifier), None)
                await self._apply(relay, self._environments.upsert(identifier, environment))
            case Delete(of=kind, id=identifier) if kind is EnvironmentDescription:
                self.invalid_entries.pop(("environment", identifier), None)
                await self._apply(relay, self._environments.delete(identifier, message.version))
                if identifier not in relay.environments:
                    relay.unusable.pop(identifier, None)
            case Upsert(id=identifier, value=FilterDescription() as payload_filter):
                self.invalid_entries.pop(("filter", identifier), None)
                changes = self._filters.upsert(identifier, payload_filter)
                await self._apply_filters(relay, changes)
            case Delete(id=identifier):
                self.invalid_entries.pop(("filter", identifier), None)
                changes = self._filters.delete(identifier, message.version)
                await self._apply_filters(relay, changes)

    async def _put(self, relay: Relay, put: Put) -> None:
        log.info("Received configuration for %d environment(s)", len(put.environments))
        for reason in (*put.invalid_environments.values(), *put.invalid_filters.values()):
            log.warning("%s", reason)
        await self._take(relay, put)
        self.known.set()
        _log.info("Finished processing auto-configuration data")

    async def _take(self, relay: Relay, put: Put) -> None:
        """Let the environments be those of a list; whatever is newer outranks a stored one."""
        relay.unusable.clear()  # all of them are tried again
        outranks = self._stored is not None and not self.known.is_set()
        invalid = put.invalid_environments
        self.invalid_entries = {
            **{("environment", each): reason for each, reason in invalid.items()},
            **{("filter", each): reason for each, reason in put.invalid_filters.items()},
        }
        environments = self._environments.put(put.environments, invalid, outranks=outranks)
        await self._apply(relay, environments)
        filters = self._filters.put(put.filters, put.invalid_filters, outranks=outranks)
        await self._apply_filters(relay, filters)

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
                    await self._remove(relay, change.id, payload_filter)
            if change.after is not None:
                await self._attempt(relay, change.after, "")
            environment = relay.environments.get(change.id)
            if environment is None:
                self._settled.pop(change.id, None)
                self._environments.forget(change.id)  # so the next put is another chance
            elif change.after is not None:
                description = settled(change.after, environment.spec)
                self._settled[change.id] = description
                for payload_filter in after[1:]:
                    await self._attempt(relay, description, payload_filter)

    async def _apply_filters(
        self, relay: Relay, changes: Iterable[ListChange[FilterDescription]]
    ) -> None:
        """Give each environment a variant for each filter of its project, and only these."""
        for change in changes:
            _report_filter(change)
            for each in self._environments.values():
                gone = change.before
                if gone and gone.key not in self._variants(each):
                    await self._remove(relay, each.id, gone.key)
        # This includes variants that could not be made the last time.
        for each in self._environments.values():
            for payload_filter in self._variants(each):
                if variant_name(each.id, payload_filter) not in relay.environments:
                    await self._attempt(relay, self._settled[each.id], payload_filter)

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
        name, reason = variant_name(description.id, payload_filter), ""
        try:
            self._carry_out(relay, description, payload_filter)
        except InvalidData as e:
            log.error("Environment data are not used: %s", e)  # noqa: TRY400 - a bug it is not
            reason = str(e)
        except Exception as e:
            log.exception('Unable to initialize auto-configured environment "%s"', name)
            reason = f"it cannot be made: {describe(e)}"
        if name in relay.environments:
            relay.unusable.pop(name, None)
        else:
            relay.unusable[name] = reason
        await asyncio.sleep(0)

    async def _remove(self, relay: Relay, environment_id: str, payload_filter: str) -> None:
        name = variant_name(environment_id, payload_filter)
        relay.unusable.pop(name, None)
        environment = relay.environments.get(name)
        if environment is not None:
            relay.remove(environment)
            self._report(DirectoryChange.REMOVED, environment.spec)
            await asyncio.sleep(0)

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
        elif spec == before and not self.known.is_set():
            return  # LaunchDarkly confirms a stored description
        else:
            is_rotated = spec.sdk_key != before.sdk_key
            source = self._make_source(spec, environment.log) if is_rotated else None
            relay.change(environment, spec, source)
            self._report(DirectoryChange.CHANGED, spec)
            if not payload_filter:  # variants have the same keys
                self.changes[DirectoryChange.ROTATED] += is_rotated
        if not payload_filter:
            log_rotation(_log, description, before, spec)

    def _report(self, change: DirectoryChange, spec: EnvironmentSpec) -> None:
        self.changes[change] += 1
        log.info("%s %s (%s)", _TEXTS[change], spec.name, spec.title)

    def _current(self) -> EnvironmentList:
        """Return the list to store."""
        age = self.connection.data_age
        confirmed = None if age is None else clock.unix() - age
        return EnvironmentList(dict(self._settled), self._filters.by_id(), confirmed)

    def _confirm(self, *, changed: bool = False) -> None:
        """Record that the list is current; update the mirrors."""
        if not self.known.is_set():
            return  # a patch before the first put is not the list
        now = clock.monotonic()
        self.connection.has_data = True
        self.connection.last_confirmed = now
        self.connection.enter(ConnectionState.VALID)
        if changed or now - self._mirrors_updated_at >= CONFIRM_EVERY:
            self._mirrors_updated_at = now
            for mirror in self._mirrors:
                mirror.update()
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


def _is_newer(stored: EnvironmentList, other: EnvironmentList | None) -> bool:
    """Return whether a list was confirmed after another one, or is all there is."""
    return other is None or (stored.confirmed or 0.0) > (other.confirmed or 0.0)


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
