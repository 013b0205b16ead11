"""The endpoints of events (endpoints 1.8): posts are accepted, and answered when they are safe.

Events of a current schema are not parsed, here or anywhere. Those of schemas 1 and 2 are summarised
before they are accepted, so that what is kept is what upstream will get.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY as NO_ITEMS
from relay.model.payload import Payload
from relay.protocol.events import (
    SUMMARY_SCHEMA,
    Contexts,
    Summarised,
    is_array,
    is_empty,
    summarised,
)
from relay.telemetry.log import Log, environment_log
from relay.web.bodies import BODIES_OVERLOADED, MemoryBudget, RequestBody, RequestRejected
from relay.web.responses import EVENTS_DISABLED, PreparedResponse, json_error
from relay.web.routing import Handler, parameter

LAST_OLD_SCHEMA = 2
"""Events of later schemas come summarised."""

IMAGE_SCHEMA = 3
"""That of the events in the address of an image (endpoints 1.8)."""

SUMMARISED_AT_ONCE = 128 * 1024
"""Bytes up to which a post is summarised in the event loop: a few milliseconds."""

MAX_SUMMARISED_PARTITIONS = 256
"""Lanes whose contexts are remembered; tags are whatever clients say."""

MAX_ORIGINS = 256
"""Kinds of senders in an environment whose posts travel apart. Each costs a task while something
waits, and clients may say what they like; of further ones tags and wrapper are not passed on."""

REPORT_EVERY = 60.0
"""Seconds between two lines about what could not be used."""

_SCHEMA_HEADER = b"x-launchdarkly-event-schema"
_SCHEMA = re.compile(rb"\+?0*[0-9]{1,2}")
_PAYLOAD_ID = re.compile(rb"[!-~]{1,100}")
_STANDARD_ALPHABET = str.maketrans("-_ ", "+/+")
"""From the URL-safe one; in a query an unescaped `+` reads as a blank."""

_GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")

ACCEPTED = PreparedResponse(202)
IMAGE = PreparedResponse(200, ((b"content-type", b"image/gif"),), _GIF)
EMPTY = json_error(400, "body may not be empty")


class EventAcceptor(Protocol):
    """What takes posts and sees to their delivery."""

    def accept(self, post: EventPayload) -> Awaitable[object]:
        """Take a post; the result is there when it is safe.

        Raises:
            StoreUnavailable: it cannot be taken.
        """

    def server_time(self, environment: str) -> float:
        """Return upstream's clock at its last answer, in Unix seconds; 0 before the first."""


class Discarder:
    """Takes posts and drops them, where flags come from a file and events go nowhere.

    The reference does so in offline mode (offline-and-autoconfig 7.3).

    Args:
        discarded: counts them, by environment.
    """

    def __init__(self, discarded: Counter[str]) -> None:
        self._discarded = discarded

    def accept(self, post: EventPayload) -> Awaitable[object]:
        """Drop a post."""
        self.discard(post.partition.environment)
        done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    def discard(self, environment: str) -> None:
        """Count a post that was dropped, whatever was in it."""
        self._discarded[environment] += 1

    def server_time(self, _environment: str) -> float:
        """Return 0: there is no upstream."""
        return 0.0


@dataclass(slots=True)
class _IntroducedContexts:
    """Whom upstream knows in a lane; one post at a time may ask."""

    contexts: Contexts = field(default_factory=Contexts)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Report:
    """What could not be used in an environment, and has not been told yet."""

    number: int = 0
    due: float = 0.0


class EventsHandler:
    """Answers what SDKs send to the endpoints of events.

    Args:
        forwarder: takes posts, or drops them; None if events are off.
        max_size: bytes of the largest post, decompressed; 0 for the bound of `relay.web.body`.
        unusable: counts posts that are no arrays, and old events that are malformed, by
            environment.
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
        """For bodies that are received, at both doors."""
        self._origins: defaultdict[str, set[tuple[int, str, str]]] = defaultdict(set)
        """Schema, tags and wrapper that were seen, by environment."""
        self._crowded: set[str] = set()
        """Environments in which there are more."""
        self._introduced: OrderedDict[Partition, _IntroducedContexts] = OrderedDict()
        """The lane used last comes last."""
        self._reports: dict[str, _Report] = {}

    def handler(self, endpoint: EventsEndpoint) -> Handler:
        """Return what answers posts to an endpoint."""

        async def respond(request: Request, environment: Environment) -> Response:
            return (await self._answer(request, environment, endpoint)).to_starlette()

        return respond

    async def image(self, request: Request, environment: Environment) -> Response:
        """Answer a request for the image, in whose address browsers send events."""
        if self._forwarder is None:
            return EVENTS_DISABLED.to_starlette()
        body = _from_base64(parameter(request, "d")) if request.method == "GET" else b""
        if isinstance(self._forwarder, Discarder):
            if body:
                self._forwarder.discard(environment.spec.name)
        elif body:
            lane = Partition(environment.spec.name, EventsEndpoint.CLIENT_SIDE, IMAGE_SCHEMA)
            try:
                await self._accept_events(self._forwarder, environment, _post(lane, "", body))
            except StoreUnavailable:
                return BODIES_OVERLOADED.to_starlette()
        return IMAGE.to_starlette()

    async def _answer(
        self, request: Request, environment: Environment, endpoint: EventsEndpoint
    ) -> PreparedResponse:
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
            await self._accept(self._forwarder, environment, endpoint, _first(request), content)
        except RequestRejected as e:
            return await body.reject(e.response)
        except StoreUnavailable:
            return BODIES_OVERLOADED
        finally:
            body.release()
        return ACCEPTED

    @property
    def enabled(self) -> bool:
        """Whether events are taken at all."""
        return self._forwarder is not None

    def accept_plain(
        self,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> Awaitable[object] | None:
        """Accept a post that is passed on as it is, like nearly all.

        Args:
            environment: whose events they are.
            endpoint: to which it was sent.
            headers: of the request; names in lower case, each with its first value.
            body: decompressed.

        Returns:
            The result is there when the post is safe; None if it needs more than that.

        Raises:
            StoreUnavailable: it cannot be taken.
        """
        if self._forwarder is None or not _is_plain(endpoint, headers, body):
            return None
        return self._forwarder.accept(self._payload_of(environment, endpoint, headers, body))

    def accept_in_partition(
        self, partition: Partition, payload_id: str, body: bytes
    ) -> Awaitable[object] | None:
        """Accept a post of a current schema, of whose head that is known.

        Returns:
            The result is there when the post is safe; None if it needs more than that.

        Raises:
            StoreUnavailable: it cannot be taken.
        """
        if self._forwarder is None or not _is_deliverable(partition.endpoint, body):
            return None
        return self._forwarder.accept(EventPayload(partition, payload_id, body, time.time()))

    async def _accept(
        self,
        forwarder: EventAcceptor,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> None:
        post = self._payload_of(environment, endpoint, headers, body)
        if endpoint.diagnostic:
            await forwarder.accept(post)
        else:
            await self._accept_events(forwarder, environment, post, old=_is_old(headers))

    def _payload_of(
        self,
        environment: Environment,
        endpoint: EventsEndpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
    ) -> EventPayload:
        return _post(self.partition(environment, endpoint, headers), _payload_id(headers), body)

    def partition(
        self, environment: Environment, endpoint: EventsEndpoint, headers: Mapping[bytes, bytes]
    ) -> Partition:
        """Return how a post travels that has come with these headers."""
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
        """Whether a kind of senders may travel apart; the first ones may."""
        known = self._origins[environment.spec.name]
        if origin in known or len(known) < MAX_ORIGINS:
            known.add(origin)
            return True
        if environment.spec.name not in self._crowded:
            self._crowded.add(environment.spec.name)
            text = "Events come from more than %d kinds of senders; tags of others are left out"
            _log_of(environment).warning(text, MAX_ORIGINS)
        return False

    async def _accept_events(
        self,
        forwarder: EventAcceptor,
        environment: Environment,
        post: EventPayload,
        *,
        old: bool = False,
    ) -> None:
        """Pass on what can be delivered, which is what looks like an array and holds something."""
        if not is_array(post.body):
            self._note_unusable(environment, "a post is no JSON array", 1)
        elif is_empty(post.body):
            pass
        elif old:
            await self._accept_old(forwarder, environment, post)
        else:
            await forwarder.accept(post)

    async def _accept_old(
        self, forwarder: EventAcceptor, environment: Environment, post: EventPayload
    ) -> None:
        """Summarise a post and pass it on.

        Lanes are told apart by their schema here, as in the reference, not afterwards.
        """
        introduced = self._contexts_of(post.partition)
        async with introduced.turn:
            server_time = forwarder.server_time(environment.spec.name)
            payload = environment.payload or NO_ITEMS
            result = await _summarised(post, payload, introduced.contexts, server_time)
        for reason, number in result.dropped.items():
            self._note_unusable(environment, reason, number)
        if result.body is None:
            return
        lane = post.partition._replace(schema=SUMMARY_SCHEMA)
        try:
            await forwarder.accept(EventPayload(lane, post.payload_id, result.body, post.received))
        except StoreUnavailable:
            introduced.contexts.forget()
            raise

    def _contexts_of(self, partition: Partition) -> _IntroducedContexts:
        introduced = self._introduced.pop(partition, None) or _IntroducedContexts()
        self._introduced[partition] = introduced
        if len(self._introduced) > MAX_SUMMARISED_PARTITIONS:
            self._introduced.popitem(last=False)
        return introduced

    def _note_unusable(self, environment: Environment, reason: str, number: int) -> None:
        """Count it, and say so at once the first time, then once a minute at most."""
        spec = environment.spec
        self.unusable[spec.name] += number
        report = self._reports.setdefault(spec.name, _Report())
        report.number += number
        now = time.monotonic()
        if now >= report.due:
            text = "Posts or events that cannot be used were dropped: %d, the last one because: %s"
            _log_of(environment).warning(text, report.number, reason)
            report.number, report.due = 0, now + REPORT_EVERY


def _log_of(environment: Environment) -> Log:
    return environment_log(environment.spec.name, environment.spec.sdk_key.masked)


async def _summarised(
    post: EventPayload, payload: Payload, contexts: Contexts, server_time: float
) -> Summarised:
    def flag(key: str) -> Item | None:
        return payload.get(Kind.FLAG, key)

    contexts.forget_old(time.monotonic())

    def work() -> Summarised:
        now, theirs = int(post.received * 1000), int(server_time * 1000)
        return summarised(
            post.body,
            post.partition.schema,
            flag,
            contexts,
            now=now,
            server_time=theirs,
        )

    return work() if len(post.body) <= SUMMARISED_AT_ONCE else await asyncio.to_thread(work)


def _post(lane: Partition, payload_id: str, body: bytes) -> EventPayload:
    return EventPayload(lane, payload_id, body, time.time())


def _schema(given: bytes) -> int:
    """Return the schema that a header names; 1 if it names none (events 5.2)."""
    return max(1, int(given)) if _SCHEMA.fullmatch(given) else 1


def _is_old(headers: Mapping[bytes, bytes]) -> bool:
    """Whether events come one by one, and are to be summarised."""
    schema = _schema(headers.get(_SCHEMA_HEADER, b""))
    return schema <= LAST_OLD_SCHEMA or b"x-launchdarkly-unsummarized" in headers


def _is_plain(endpoint: EventsEndpoint, headers: Mapping[bytes, bytes], body: bytes) -> bool:
    if not endpoint.diagnostic and _is_old(headers):
        return False
    return _is_deliverable(endpoint, body)


def _is_deliverable(endpoint: EventsEndpoint, body: bytes) -> bool:
    """Whether a body is passed on; that of diagnostics whatever it is."""
    if body[:2] == b"[{" and body[-1:] == b"]":
        return True  # like nearly all
    return bool(body) if endpoint.diagnostic else is_array(body) and not is_empty(body)


def _first(request: Request) -> Mapping[bytes, bytes]:
    """Return the headers of a request, each with its first value."""
    return dict(reversed(request.scope["headers"]))


def _payload_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the SDK's payload id; empty if there is none, or none that SDKs would make."""
    given = headers.get(b"x-launchdarkly-payload-id", b"")
    return given.decode() if is_payload_id(given) else ""


def is_payload_id(given: bytes) -> bool:
    """Whether it is an id that SDKs would make."""
    return _PAYLOAD_ID.fullmatch(given) is not None


def _from_base64(text: str) -> bytes:
    """Return what a text in either alphabet encodes, padded or not; empty if it is neither."""
    text = text.translate(_STANDARD_ALPHABET).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""
