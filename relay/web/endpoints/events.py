"""Events endpoints (endpoints 1.8): accept payloads, and respond once they are safe.

Payloads of current schemas are never parsed. Those of schemas 1 and 2 are summarised before they
are accepted, so that the stored bytes are those that upstream gets.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from relay import clock
from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.lru import LRUMap
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY as NO_ITEMS
from relay.model.payload import Payload
from relay.model.text import from_base64
from relay.protocol.events import (
    SUMMARY_SCHEMA,
    Contexts,
    Summary,
    is_array,
    is_empty,
    summarise,
)
from relay.telemetry.throttle import Throttle
from relay.web.access import Access
from relay.web.bodies import BODIES_OVERLOADED, MemoryBudget, RequestBody, RequestRejected
from relay.web.requests import first_values, parameter
from relay.web.responses import EVENTS_DISABLED, PreparedResponse, json_error

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
_GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")

ACCEPTED = PreparedResponse(202)
IMAGE = PreparedResponse(200, ((b"content-type", b"image/gif"),), _GIF)
EMPTY = json_error(400, "body may not be empty")


class EventAcceptor(Protocol):
    """Destination of event payloads."""

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Accept a payload for delivery; the result resolves once it is safe.

        Raises:
            StoreUnavailable: it cannot be accepted.
        """

    def server_time(self, environment: str) -> float:
        """Return upstream's time at its last response, in Unix seconds; 0 before the first."""


class Discarder:
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


class EventsHandler:
    """Handler of the events endpoints, for the application and the fast path.

    Args:
        forwarder: accepts payloads; None if events are disabled.
        max_size: bytes of the largest payload, decompressed; 0 for `relay.web.bodies.MAX_SIZE`.
        unusable: counts payloads that are not JSON arrays, and malformed events of schemas 1
            and 2, by environment.
    """

    def __init__(
        self,
        forwarder: EventAcceptor | None = None,
        max_size: int = 0,
        unusable: Counter[str] | None = None,
    ) -> None:
        self.unusable = Counter() if unusable is None else unusable
        self._forwarder = forwarder
        self.budget = MemoryBudget(max_size)
        """Shared by the application and the fast path."""
        self._origins: defaultdict[str, set[tuple[int, str, str]]] = defaultdict(set)
        """Combinations of schema, tags and wrapper, by environment."""
        self._over_limit: set[str] = set()
        """Environments that exceed `MAX_ORIGINS`, which has been logged."""
        self._introduced: LRUMap[Partition, _IntroducedContexts] = LRUMap(MAX_SUMMARISED_PARTITIONS)
        self._reports: defaultdict[str, Throttle] = defaultdict(lambda: Throttle(REPORT_EVERY))
        """Reports of unusable payloads and events, by environment."""

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"<EventsHandler [{state}, {self.unusable.total()} unusable]>"

    async def image(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a request for the image in whose URL browsers send events."""
        environment = access.environment
        if self._forwarder is None:
            return EVENTS_DISABLED
        body = _events_in(parameter(request, "d")) if request.method == "GET" else b""
        if isinstance(self._forwarder, Discarder):
            if body:
                self._forwarder.discard(environment.spec.name)
        elif body:
            partition = Partition(environment.spec.name, EventsEndpoint.CLIENT_SIDE, IMAGE_SCHEMA)
            try:
                await self._accept_events(
                    self._forwarder, environment, _new_payload(partition, "", body)
                )
            except StoreUnavailable:
                return BODIES_OVERLOADED
        return IMAGE

    async def handle(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a POST of events."""
        environment, endpoint = access.environment, access.route.events_endpoint
        body = RequestBody(request, self.budget)
        try:
            await body.begin()
            if self._forwarder is None:
                return await body.reject(EVENTS_DISABLED)
            if isinstance(self._forwarder, Discarder):
                self._forwarder.discard(environment.spec.name)
                return await body.reject(ACCEPTED)
            content = await body.read()
            if not content:
                return EMPTY
            headers = first_values(request)
            await self._accept(self._forwarder, environment, endpoint, headers, content)
        except RequestRejected as e:
            return await body.reject(e.response)
        except StoreUnavailable:
            return BODIES_OVERLOADED
        finally:
            body.release()
        return ACCEPTED

    @property
    def enabled(self) -> bool:
        """True if events are accepted."""
        return self._forwarder is not None

    def forget(self, environment: str) -> None:
        """Forget an environment that is gone."""
        self._origins.pop(environment, None)
        self._over_limit.discard(environment)
        self._reports.pop(environment, None)
        for partition in [p for p in self._introduced if p.environment == environment]:
            self._introduced.forget(partition)

    def accept_plain(
        self,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> asyncio.Future[bool] | None:
        """Accept a payload that is passed on unchanged, as nearly all are.

        Args:
            environment: that the events belong to.
            endpoint: that received the payload.
            headers: of the request; names in lower case, each with its first value.
            body: decompressed.

        Returns:
            Resolves once the payload is safe; None if it cannot be passed on unchanged.

        Raises:
            StoreUnavailable: it cannot be accepted.
        """
        if self._forwarder is None or not _is_plain(endpoint, headers, body):
            return None
        return self._forwarder.accept(self._payload_of(environment, endpoint, headers, body))

    def accept_in_partition(
        self, partition: Partition, payload_id: str, body: bytes
    ) -> asyncio.Future[bool] | None:
        """Accept a payload of a current schema whose partition is known already.

        Returns:
            Resolves once the payload is safe; None if it cannot be passed on unchanged.

        Raises:
            StoreUnavailable: it cannot be accepted.
        """
        if self._forwarder is None or not _is_deliverable(partition.endpoint, body):
            return None
        return self._forwarder.accept(EventPayload(partition, payload_id, body, clock.unix()))

    async def _accept(
        self,
        forwarder: EventAcceptor,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> None:
        payload = self._payload_of(environment, endpoint, headers, body)
        if endpoint.diagnostic:
            await forwarder.accept(payload)
        else:
            await self._accept_events(forwarder, environment, payload, old=_is_old(headers))

    def _payload_of(
        self,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> EventPayload:
        return _new_payload(
            self.partition(environment, endpoint, headers), _payload_id(headers), body
        )

    def partition(
        self, environment: Environment, endpoint: EventsEndpoint, headers: Mapping[bytes, bytes]
    ) -> Partition:
        """Return the partition of a payload with these headers."""
        name = environment.spec.name
        if endpoint.diagnostic:
            return Partition(name, endpoint)
        schema = _schema(headers.get(_SCHEMA_HEADER, b""))
        tags = headers.get(b"x-launchdarkly-tags", b"").decode("latin-1")
        wrapper = headers.get(b"x-launchdarkly-wrapper", b"").decode("latin-1")
        if not self._is_known_origin(environment, (schema, tags, wrapper)):
            tags = wrapper = ""
        return Partition(name, endpoint, schema, tags, wrapper)

    def _is_known_origin(self, environment: Environment, origin: tuple[int, str, str]) -> bool:
        """Return whether an origin gets a partition of its own; the first `MAX_ORIGINS` do."""
        known = self._origins[environment.spec.name]
        if origin in known or len(known) < MAX_ORIGINS:
            known.add(origin)
            return True
        if environment.spec.name not in self._over_limit:
            self._over_limit.add(environment.spec.name)
            text = "Events come from more than %d kinds of senders; tags of others are left out"
            environment.log.warning(text, MAX_ORIGINS)
        return False

    async def _accept_events(
        self,
        forwarder: EventAcceptor,
        environment: Environment,
        payload: EventPayload,
        *,
        old: bool = False,
    ) -> None:
        """Pass on a payload that looks like a JSON array with elements; drop any other."""
        if not is_array(payload.body):
            self._count_unusable(environment, "a post is no JSON array", 1)
        elif is_empty(payload.body):
            pass
        elif old:
            await self._accept_old(forwarder, environment, payload)
        else:
            await forwarder.accept(payload)

    async def _accept_old(
        self, forwarder: EventAcceptor, environment: Environment, payload: EventPayload
    ) -> None:
        """Summarise a payload of an old schema and pass it on.

        Introduced contexts are kept by partition before summarising, that is by the old schema, as
        in ld-relay.
        """
        introduced = self._contexts_of(payload.partition)
        async with introduced.lock:
            server_time = forwarder.server_time(environment.spec.name)
            data = environment.payload or NO_ITEMS
            result = await _summarised(payload, data, introduced.contexts, server_time)
        for reason, number in result.dropped.items():
            self._count_unusable(environment, reason, number)
        if result.body is None:
            return
        partition = payload.partition._replace(schema=SUMMARY_SCHEMA)
        try:
            await forwarder.accept(
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

    def _count_unusable(self, environment: Environment, reason: str, number: int) -> None:
        """Count unusable payloads or events, and log them at once, then at most once a minute."""
        spec = environment.spec
        self.unusable[spec.name] += number
        dropped = self._reports[spec.name].count(number)
        if dropped:
            text = "Posts or events that cannot be used were dropped: %d, the last one because: %s"
            environment.log.warning(text, dropped, reason)


async def _summarised(
    payload: EventPayload, data: Payload, contexts: Contexts, server_time: float
) -> Summary:
    def flag(key: str) -> Item | None:
        return data.get(Kind.FLAG, key)

    contexts.forget_old(clock.monotonic())

    def work() -> Summary:
        now, upstream_now = int(payload.received * 1000), int(server_time * 1000)
        return summarise(
            payload.body,
            payload.partition.schema,
            flag,
            contexts,
            now=now,
            server_time=upstream_now,
        )

    return work() if len(payload.body) <= SUMMARISED_AT_ONCE else await asyncio.to_thread(work)


def _new_payload(partition: Partition, payload_id: str, body: bytes) -> EventPayload:
    return EventPayload(partition, payload_id, body, clock.unix())


def _schema(value: bytes) -> int:
    """Return the schema in a header; 1 if it is not a schema (events 5.2)."""
    return max(1, int(value)) if _SCHEMA.fullmatch(value) else 1


def _is_old(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether events arrive one by one, and have to be summarised."""
    schema = _schema(headers.get(_SCHEMA_HEADER, b""))
    return schema <= LAST_OLD_SCHEMA or b"x-launchdarkly-unsummarized" in headers


def _is_plain(endpoint: EventsEndpoint, headers: Mapping[bytes, bytes], body: bytes) -> bool:
    if not endpoint.diagnostic and _is_old(headers):
        return False
    return _is_deliverable(endpoint, body)


def _is_deliverable(endpoint: EventsEndpoint, body: bytes) -> bool:
    """Return whether a body is passed on; a diagnostic body is unless it is empty."""
    if body[:2] == b"[{" and body[-1:] == b"]":
        return True  # without a scan, as nearly all bodies are
    return bool(body) if endpoint.diagnostic else is_array(body) and not is_empty(body)


def _payload_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the payload ID of an SDK; empty without a plausible one."""
    value = headers.get(b"x-launchdarkly-payload-id", b"")
    return value.decode() if is_payload_id(value) else ""


def is_payload_id(value: bytes) -> bool:
    """Return whether a value is plausible as the payload ID of an SDK."""
    return _PAYLOAD_ID.fullmatch(value) is not None


def _events_in(text: str) -> bytes:
    """Return the events in a query; empty if they are no base64."""
    try:
        # An unescaped `+` in a query is decoded as a blank.
        return from_base64(text.replace(" ", "+").encode())
    except ValueError:
        return b""
