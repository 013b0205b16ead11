"""Polls of server-side SDKs: responses are prepared once for each payload and variant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from weakref import WeakKeyDictionary

from relay.environment import Environment
from relay.model.item import Kind
from relay.model.payload import Payload
from relay.protocol.fdv1 import all_data, all_flags
from relay.web.resources import Resource, with_ttl
from relay.web.responses import NO_SUCH_ITEM, Headers, PreparedResponse, environment_headers

MAX_ITEMS = 1024
"""Prepared resources per environment: PHP SDKs poll a few single flags again and again."""

_ITEM_PATHS = (("/sdk/flags/", Kind.FLAG), ("/sdk/segments/", Kind.SEGMENT))
_NO_KEYS = ("", ".", "..")
"""Keys in paths that are not canonical, which the application redirects."""


def template(path: str) -> str:
    """Return the route template of a poll, such as `/sdk/flags/{key}`."""
    for prefix, _ in _ITEM_PATHS:
        if path.startswith(prefix):
            return prefix + "{key}"
    return path


class _PollResources:
    """Resources of one payload that can be polled, built on first use."""

    def __init__(self, payload: Payload, headers: Headers) -> None:
        self.payload = payload
        self._headers = headers
        self._cache: dict[str, Resource | None] = {}
        self._builders: dict[str, Callable[[], Resource]] = {
            "/sdk/flags": self._flags,
            "/sdk/latest-all": self._latest_all,
        }

    def get(self, path: str) -> Resource | None:
        """Return the resource at a path; None if the item does not exist or is deleted.

        Raises:
            KeyError: the path is not that of a poll.
        """
        if path not in self._cache:
            resource = self._build(path)
            if len(self._cache) >= MAX_ITEMS:
                self._cache.clear()
            self._cache[path] = resource
        return self._cache[path]

    def _build(self, path: str) -> Resource | None:
        for prefix, kind in _ITEM_PATHS:
            if path.startswith(prefix):
                return self._item(kind, path.removeprefix(prefix))
        return self._builders[path]()

    def _item(self, kind: Kind, key: str) -> Resource | None:
        if "/" in key or key in _NO_KEYS:
            raise KeyError(key)
        item = self.payload.get(kind, key)
        if item is None or item.json is None:
            return None
        return Resource((item.json,), b"relay-%d" % item.version, self._headers)

    def _flags(self) -> Resource:
        body = all_flags(self.payload)
        return Resource((body,), _versions_etag(self.payload), self._headers)

    def _latest_all(self) -> Resource:
        return Resource((all_data(self.payload),), _data_etag(self.payload), self._headers)


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


class PollingHandler:
    """Handler of polls, for the application and the fast path."""

    def __init__(self) -> None:
        self._resources: WeakKeyDictionary[Environment, _PollResources] = WeakKeyDictionary()

    def __call__(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the response to a poll at once; None if it is left to the application.

        Args:
            environment: to poll.
            path: as received; one with a query or an escape is left to the application.
            if_none_match: the header; empty without one.
            accept_encoding: the header; empty without one.
        """
        if "%" in path or "?" in path:
            return None
        return self.respond(environment, path, if_none_match, accept_encoding)

    def respond(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the response to a poll at once.

        None if there is no data, if the path is not that of a poll, or if a large body must be
        compressed in a thread first (see `complete`).

        Args:
            environment: to poll.
            path: decoded.
            if_none_match: the header; empty without one.
            accept_encoding: the header; empty without one.
        """
        resource = self._resource_at(environment, path)
        if not isinstance(resource, Resource):
            return resource
        return with_ttl(resource.variant(if_none_match, accept_encoding), environment)

    async def complete(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the response to a poll, compressing a large body in a thread if necessary.

        Arguments as in `respond`; None if there is no data, or the path is not that of a poll.
        """
        resource = self._resource_at(environment, path)
        if not isinstance(resource, Resource):
            return resource
        response = resource.variant(if_none_match, accept_encoding)
        if response is None:
            response = await resource.compress_in_thread()
        return with_ttl(response, environment)

    def _resource_at(
        self, environment: Environment, path: str
    ) -> Resource | PreparedResponse | None:
        if environment.payload is None:
            return None
        try:
            resource = self._resources_of(environment, environment.payload).get(path)
        except KeyError:
            return None
        return resource or NO_SUCH_ITEM.with_headers(*environment_headers(environment.spec))

    def _resources_of(self, environment: Environment, payload: Payload) -> _PollResources:
        resources = self._resources.get(environment)
        if resources is None or resources.payload is not payload:
            resources = self._resources[environment] = _PollResources(
                payload, environment_headers(environment.spec)
            )
        return resources
