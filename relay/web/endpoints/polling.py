"""Polls of server-side SDKs: responses are prepared once for each payload and variant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from weakref import WeakKeyDictionary

from starlette.requests import Request

from relay.environment import Environment
from relay.lru import LRUMap
from relay.model.answers import AnswerCounter
from relay.model.environment import EnvironmentSpec
from relay.model.item import Kind
from relay.model.journal import Delta, Journal
from relay.model.payload import Payload
from relay.protocol import fdv2
from relay.protocol.fdv1 import all_data, all_flags
from relay.web.access import Access
from relay.web.bases import Bases, is_behind, wait_until_reached
from relay.web.requests import first_values
from relay.web.resources import Resource, with_ttl
from relay.web.responses import (
    NO_DATA,
    NO_SUCH_ITEM,
    PreparedResponse,
    environment_headers,
)

MAX_ITEMS = 1024
"""Prepared resources per environment: PHP SDKs poll a few single flags again and again."""

MAX_TRANSFERS = 64
"""Prepared transfers per environment: clients come with few different states between changes."""

DELTAS = "/sdk/poll"
"""Template of the route whose clients name the state of their data."""


class _PollResources:
    """Resources of one payload that can be polled, built on first use."""

    def __init__(self, payload: Payload, journal: Journal, spec: EnvironmentSpec) -> None:
        self.payload = payload
        self.spec = spec
        self._journal = journal
        self._headers = environment_headers(spec)
        self._cache: dict[tuple[str, str], Resource | None] = {}
        self._transfers: LRUMap[int | str, Resource] = LRUMap(MAX_TRANSFERS)
        self._builders: Mapping[str, Callable[[str], Resource | None]] = {
            "/sdk/flags": self._flags,
            "/sdk/latest-all": self._latest_all,
            "/sdk/flags/{key}": partial(self._item, Kind.FLAG),
            "/sdk/segments/{key}": partial(self._item, Kind.SEGMENT),
        }

    def get(self, template: str, key: str) -> Resource | None:
        """Return the resource of a route; None if the item does not exist or is deleted.

        Args:
            template: of the route.
            key: of the item, or state of the client's data; empty for a route without one.
        """
        if template == DELTAS:
            return self._transfer(key)
        found = template, key
        if found not in self._cache:
            resource = self._builders[template](key)
            if len(self._cache) >= MAX_ITEMS:
                self._cache.clear()
            self._cache[found] = resource
        return self._cache[found]

    def _item(self, kind: Kind, key: str) -> Resource | None:
        item = self.payload.get(kind, key)
        if item is None or item.json is None:
            return None
        return Resource((item.json,), b"relay-%d" % item.version, self._headers)

    def _flags(self, _key: str) -> Resource:
        body = all_flags(self.payload)
        return Resource((body,), _versions_etag(self.payload), self._headers)

    def _latest_all(self, _key: str) -> Resource:
        return Resource((all_data(self.payload),), _data_etag(self.payload), self._headers)

    def _transfer(self, basis: str) -> Resource:
        """Return what a client misses; only that without a basis has an ETag (fdv2 13.8.8)."""
        answer = self._journal.answer(basis)
        transfer = self._transfers.get(answer.key)
        if transfer is None:
            body = fdv2.poll(fdv2.respond(self._journal, self.payload, answer))
            etag = b"" if basis else b'"%b"' % self._journal.state.encode()
            transfer = Resource((body,), etag, self._headers)
            self._transfers.put(answer.key, transfer)
        return transfer


def _versions_etag(payload: Payload) -> bytes:
    """Return ld-relay's ETag of all flags, made of keys and versions, tombstones included."""
    entries = ((item.key.encode(), item.version) for item in payload.flags.values())
    text = b"".join(b"%b:%d" % entry for entry in sorted(entries))
    digest = hashlib.sha1(text, usedforsecurity=False).hexdigest()
    return b"relay-" + digest[:15].encode()


def _data_etag(payload: Payload) -> bytes:
    """Return a strong ETag: equal for equal data, regardless of order and history."""
    digest = hashlib.sha256()
    for kind in Kind:
        for item in sorted(payload.live(kind), key=lambda item: item.key):
            key, json = item.key.encode(), item.json or b""
            sizes = b"%b %d %d %d " % (kind.value.encode(), len(key), item.version, len(json))
            digest.update(sizes + key)
            digest.update(json)
    return b'"%b"' % digest.hexdigest()[:32].encode()


def _with_ttl(response: PreparedResponse, access: Access) -> PreparedResponse:
    # Some SDKs would take an answer out of their cache for "no changes" (fdv2 13.5).
    return response if access.route.template == DELTAS else with_ttl(response, access.environment)


class PollingHandler:
    """Handler of polls, for the application and the fast path."""

    def __init__(self) -> None:
        self.bases = Bases()
        """Reads the states that clients name."""
        self._resources: WeakKeyDictionary[Environment, _PollResources] = WeakKeyDictionary()

    async def handle(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a poll; a large body is compressed in a thread if necessary."""
        headers, query = first_values(request), request.scope["query_string"]
        key = self.key(access, request.path_params.get("key", ""), headers, query)
        if access.route.template == DELTAS:
            await wait_until_reached(access.environment, key)
        resource = self._resource(access, key)
        if not isinstance(resource, Resource):
            return resource or NO_DATA
        none_match = headers.get(b"if-none-match", b"")
        response = resource.variant(none_match, headers.get(b"accept-encoding", b""))
        noted = response or resource.plain
        self.note(access, key, headers, noted)
        if counter := self.counter(access, key, noted):
            counter.add()
        if response is None:
            response = await resource.compress_in_thread()
        return _with_ttl(response, access)

    def key(
        self, access: Access, segment: str, headers: Mapping[bytes, bytes], query: bytes
    ) -> str:
        """Return what a poll asks for, besides its route: an item, or what follows a state.

        Args:
            access: environment to poll, and the route.
            segment: key of the item; empty for a route without one.
            headers: of the request, by name in lower case.
            query: of the request.
        """
        if access.route.template != DELTAS:
            return segment
        return self.bases.of_poll(access.environment, headers, query)

    def respond(
        self, access: Access, key: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the response to a poll at once.

        None if there is no data, if a large body must be compressed in a thread first, or if these
        data seem to be behind those of the client.

        Args:
            access: environment to poll, and the route.
            key: see `key`.
            if_none_match: the header; empty without one.
            accept_encoding: the header; empty without one.
        """
        if access.route.template == DELTAS and is_behind(access.environment, key):
            return None
        resource = self._resource(access, key)
        if not isinstance(resource, Resource):
            return resource
        response = resource.variant(if_none_match, accept_encoding)
        return response and _with_ttl(response, access)

    def note(
        self,
        access: Access,
        key: str,
        headers: Mapping[bytes, bytes],
        response: PreparedResponse,
    ) -> bool:
        """Remember a response that tells about the client's next request; return if it was one.

        Args:
            access: environment that was polled, and the route.
            key: see `key`.
            headers: of the request, by name in lower case.
            response: to the poll.
        """
        if access.route.template != DELTAS or not self.bases.is_noted(headers, key):
            return False
        if response.status == HTTPStatus.OK:
            self.bases.note(access.environment, headers)
        return True

    def counter(self, access: Access, key: str, response: PreparedResponse) -> AnswerCounter | None:
        """Return what counts an answer to a client that names its state, each time it is given.

        Args:
            access: environment that was polled, and the route.
            key: see `key`.
            response: to the poll.
        """
        if access.route.template != DELTAS:
            return None
        journal = access.environment.journal
        is_known = response.status == HTTPStatus.NOT_MODIFIED
        return journal.counter(Delta((), journal.step) if is_known else journal.answer(key))

    def _resource(self, access: Access, key: str) -> Resource | PreparedResponse | None:
        environment, template = access.environment, access.route.template
        if environment.payload is None:
            return None
        resources = self._resources_of(environment, environment.payload)
        resource = resources.get(template, key)
        return resource or NO_SUCH_ITEM.with_headers(*environment_headers(environment.spec))

    def _resources_of(self, environment: Environment, payload: Payload) -> _PollResources:
        resources, spec = self._resources.get(environment), environment.spec
        if resources is None or resources.payload is not payload or resources.spec is not spec:
            resources = self._resources[environment] = _PollResources(
                payload, environment.journal, spec
            )
        return resources
