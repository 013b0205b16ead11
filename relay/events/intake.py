"""Intake of event payloads: which are accepted, in which partition, and in which form.

Payloads of current schemas are never parsed. Those of schemas 1 and 2 are summarised before they
are accepted, so that the stored bytes are those that upstream gets.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from relay import clock
from relay.errors import StoreUnavailable
from relay.lru import LRUMap
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY as NO_ITEMS
from relay.model.payload import Payload
from relay.protocol.events import (
    SUMMARY_SCHEMA,
    Contexts,
    Summary,
    is_array,
    is_empty,
    summarise,
)
from relay.telemetry.log import Log, environment_log
from relay.telemetry.throttle import Throttle

LAST_OLD_SCHEMA = 2
"""Events of later schemas arrive summarised."""

IMAGE_SCHEMA = 3
"""Schema of events in the URL of an image (endpoints 1.8)."""

SUMMARISED_AT_ONCE = 128 * 1024
"""Bytes of a payload that is summarised on the event loop, in a few ms; larger ones in a thread."""

MAX_SUMMARISED_PARTITIONS = 256
"""Partitions whose introduced contexts are remembered: clients may send any number of tags."""

MAX_ORIGINS = 256
"""Combinations of schema, tags and wrapper that get partitions of their own, in each environment. A
partition costs a task while it has a backlog, and clients may send anything; tags and wrapper of
further combinations are not passed on."""

REPORT_EVERY = 60.0
"""Seconds between two log lines about unusable payloads."""

_SCHEMA_HEADER = b"x-launchdarkly-event-schema"
_SCHEMA = re.compile(rb"\+?0*[0-9]{1,2}")
_PAYLOAD_ID = re.compile(rb"[!-~]{1,100}")


class EventAcceptor(Protocol):
    """Destination of event payloads."""

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Accept a payload for delivery; the result resolves once it is safe.

        Raises:
            StoreUnavailable: it cannot be accepted.
        """

    def server_time(self, environment: str) -> float:
        """Return upstream's time at its last response, in Unix seconds; 0 before the first."""


class DiscardingAcceptor:
    """Acceptor that drops and counts payloads, for flags from a file: events have no upstream.

    ld-relay does the same in offline mode (offline-and-autoconfig 7.3).

    Args:
        discarded: number of dropped payloads, by environment.
    """

    def __init__(self, discarded: Counter[str]) -> None:
        self._discarded = discarded

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Drop and count a payload."""
        self.discard(payload.partition.environment)
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    def discard(self, environment: str) -> None:
        """Count a dropped payload, whatever its content."""
        self._discarded[environment] += 1

    def server_time(self, _environment: str) -> float:
        """Return 0: there is no upstream."""
        return 0.0


@dataclass(slots=True)
class _IntroducedContexts:
    """Contexts introduced upstream by index events, of one partition; guarded by `lock`."""

    contexts: Contexts = field(default_factory=Contexts)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class EventIntake:
    """Passes payloads on in their partition.

    Environments are given by their description. Headers have names in lower case, each with its
    first value; bodies are decompressed. Methods that accept raise `StoreUnavailable` if a payload
    cannot be accepted.

    Args:
        acceptor: accepts payloads; None if events are disabled.
        unusable: counts payloads that are not JSON arrays, and malformed events of schemas 1
            and 2, by environment.
    """

    def __init__(self, acceptor: EventAcceptor | None, unusable: Counter[str]) -> None:
        self._acceptor = acceptor
        self._unusable = unusable
        self._origins: defaultdict[str, set[tuple[int, str, str]]] = defaultdict(set)
        """Combinations of schema, tags and wrapper, by environment."""
        self._over_limit: set[str] = set()
        """Environments that exceed `MAX_ORIGINS`, which has been logged."""
        self._introduced: LRUMap[Partition, _IntroducedContexts] = LRUMap(MAX_SUMMARISED_PARTITIONS)
        self._reports: defaultdict[str, Throttle] = defaultdict(lambda: Throttle(REPORT_EVERY))
        """Reports of unusable payloads and events, by environment."""

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"<EventIntake [{state}, {self._unusable.total()} unusable]>"

    @property
    def enabled(self) -> bool:
        """True if events are accepted."""
        return self._acceptor is not None

    def discard(self, environment: str) -> bool:
        """Count a payload that is dropped, whatever its content; return False if it is not."""
        if not isinstance(self._acceptor, DiscardingAcceptor):
            return False
        self._acceptor.discard(environment)
        return True

    def forget(self, environment: str) -> None:
        """Forget an environment that is gone."""
        self._origins.pop(environment, None)
        self._over_limit.discard(environment)
        self._reports.pop(environment, None)
        for partition in [p for p in self._introduced if p.environment == environment]:
            self._introduced.forget(partition)

    def accept_plain(
        self,
        spec: EnvironmentSpec,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> asyncio.Future[bool] | None:
        """Accept a payload that is passed on unchanged, as nearly all are.

        Returns:
            Resolves once the payload is safe; None if it cannot be passed on unchanged.
        """
        if not endpoint.diagnostic and _is_old(headers):
            return None
        partition = self.partition(spec, endpoint, headers)
        return self.accept_in_partition(partition, _payload_id(headers), body)

    def accept_in_partition(
        self, partition: Partition, payload_id: str, body: bytes
    ) -> asyncio.Future[bool] | None:
        """Accept a payload of a current schema whose partition is known already.

        Returns:
            Resolves once the payload is safe; None if it cannot be passed on unchanged.
        """
        if self._acceptor is None or not _is_deliverable(partition.endpoint, body):
            return None
        return self._acceptor.accept(EventPayload(partition, payload_id, body, clock.now()))

    async def accept(
        self,
        spec: EnvironmentSpec,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
        *,
        flags: Payload | None = None,
    ) -> None:
        """Accept any payload; return when it is safe, or dropped because it cannot be used.

        Args:
            spec: description of its environment.
            endpoint: that received it.
            headers: of the request.
            body: of the request.
            flags: of the environment, for payloads of old schemas.
        """
        stored = self.accept_plain(spec, endpoint, headers, body)
        if stored is not None:
            await stored
        elif self._is_usable(spec, body) and _is_old(headers):
            partition = self.partition(spec, endpoint, headers)
            payload = EventPayload(partition, _payload_id(headers), body, clock.now())
            await self._accept_old(spec, payload, flags or NO_ITEMS)

    async def accept_image(self, spec: EnvironmentSpec, body: bytes) -> None:
        """Accept the events in the URL of an image; return when they are safe, or dropped."""
        partition = Partition(spec.name, EventsEndpoint.CLIENT_SIDE, IMAGE_SCHEMA)
        stored = self.accept_in_partition(partition, "", body)
        if stored is not None:
            await stored
        else:
            self._is_usable(spec, body)

    def partition(
        self, spec: EnvironmentSpec, endpoint: EventsEndpoint, headers: Mapping[bytes, bytes]
    ) -> Partition:
        """Return the partition of a payload with these headers."""
        if endpoint.diagnostic:
            return Partition(spec.name, endpoint)
        schema = _schema(headers.get(_SCHEMA_HEADER, b""))
        tags = headers.get(b"x-launchdarkly-tags", b"").decode("latin-1")
        wrapper = headers.get(b"x-launchdarkly-wrapper", b"").decode("latin-1")
        if not self._is_known_origin(spec, (schema, tags, wrapper)):
            tags = wrapper = ""
        return Partition(spec.name, endpoint, schema, tags, wrapper)

    def _is_known_origin(self, spec: EnvironmentSpec, origin: tuple[int, str, str]) -> bool:
        """Return whether an origin gets a partition of its own; the first `MAX_ORIGINS` do."""
        known = self._origins[spec.name]
        if origin in known or len(known) < MAX_ORIGINS:
            known.add(origin)
            return True
        if spec.name not in self._over_limit:
            self._over_limit.add(spec.name)
            text = "Events come from more than %d kinds of senders; tags of others are left out"
            _log_of(spec).warning(text, MAX_ORIGINS)
        return False

    def _is_usable(self, spec: EnvironmentSpec, body: bytes) -> bool:
        """Return whether a body looks like a JSON array with elements; count it if it is none."""
        if not is_array(body):
            self._count_unusable(spec, "a post is no JSON array", 1)
            return False
        return not is_empty(body)

    async def _accept_old(
        self, spec: EnvironmentSpec, payload: EventPayload, flags: Payload
    ) -> None:
        """Summarise a payload of an old schema and pass it on.

        Introduced contexts are kept by partition before summarising, that is by the old schema, as
        in ld-relay.
        """
        if self._acceptor is None:
            return
        introduced = self._contexts_of(payload.partition)
        async with introduced.lock:
            server_time = self._acceptor.server_time(spec.name)
            result = await _summarised(payload, flags, introduced.contexts, server_time)
        for reason, number in result.dropped.items():
            self._count_unusable(spec, reason, number)
        if result.body is None:
            return
        partition = payload.partition._replace(schema=SUMMARY_SCHEMA)
        try:
            await self._acceptor.accept(
                EventPayload(partition, payload.payload_id, result.body, payload.received)
            )
        except StoreUnavailable:
            introduced.contexts.forget()
            raise

    def _contexts_of(self, partition: Partition) -> _IntroducedContexts:
        introduced = self._introduced.get(partition)
        if introduced is None:
            introduced = _IntroducedContexts()
            self._introduced.put(partition, introduced)
        return introduced

    def _count_unusable(self, spec: EnvironmentSpec, reason: str, number: int) -> None:
        """Count unusable payloads or events, and log them at once, then at most once a minute."""
        self._unusable[spec.name] += number
        dropped = self._reports[spec.name].count(number)
        if dropped:
            text = "Posts or events that cannot be used were dropped: %d, the last one because: %s"
            _log_of(spec).warning(text, dropped, reason)


def _log_of(spec: EnvironmentSpec) -> Log:
    return environment_log(spec.name, spec.sdk_key.masked)


async def _summarised(
    payload: EventPayload, flags: Payload, contexts: Contexts, server_time: float
) -> Summary:
    def flag(key: str) -> Item | None:
        return flags.get(Kind.FLAG, key)

    contexts.forget_old(clock.monotonic())
    now, upstream_now = int(clock.unix() * 1000), int(server_time * 1000)

    def work() -> Summary:
        return summarise(
            payload.body,
            payload.partition.schema,
            flag,
            contexts,
            now=now,
            server_time=upstream_now,
        )

    return work() if len(payload.body) <= SUMMARISED_AT_ONCE else await asyncio.to_thread(work)


def _schema(value: bytes) -> int:
    """Return the schema in a header; 1 if it is not a schema (events 5.2)."""
    return max(1, int(value)) if _SCHEMA.fullmatch(value) else 1


def _is_old(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether events arrive one by one, and have to be summarised."""
    schema = _schema(headers.get(_SCHEMA_HEADER, b""))
    return schema <= LAST_OLD_SCHEMA or b"x-launchdarkly-unsummarized" in headers


def _is_deliverable(endpoint: EventsEndpoint, body: bytes) -> bool:
    """Return whether a body is passed on; a diagnostic body is unless it is empty."""
    if body[:2] == b"[{" and body[-1:] == b"]":
        return True  # without a scan, as nearly all bodies are
    return bool(body) if endpoint.diagnostic else is_array(body) and not is_empty(body)


def _payload_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the payload ID of an SDK; empty without a plausible one."""
    value = headers.get(b"x-launchdarkly-payload-id", b"")
    return value.decode() if _PAYLOAD_ID.fullmatch(value) else ""
