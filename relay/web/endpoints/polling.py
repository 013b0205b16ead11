"""What server-side SDKs poll: prepared once per payload and variant, then only looked up."""

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
"""Single flags and segments kept ready per environment; PHP asks for few, again and again."""

_ITEM_PATHS = (("/sdk/flags/", Kind.FLAG), ("/sdk/segments/", Kind.SEGMENT))
_NO_KEYS = ("", ".", "..")
"""What stands in place of a key when a path is not canonical: the application redirects it."""


def template(path: str) -> str:
    """Return the route of a poll, such as `/sdk/flags/{key}`."""
    for prefix, _ in _ITEM_PATHS:
        if path.startswith(prefix):
            return prefix + "{key}"
    return path


class _Polls:
    """All that can be polled of one payload, made when somebody asks for it."""

    def __init__(self, payload: Payload, headers: Headers) -> None:
        self.payload = payload
        self._headers = headers
        self._ready: dict[str, Resource | None] = {}
        self._makers: dict[str, Callable[[], Resource]] = {
            "/sdk/flags": self._flags,
            "/sdk/latest-all": self._latest_all,
        }

    def get(self, path: str) -> Resource | None:
        """Return a resource.

        Raises:
            KeyError: nothing of the kind is polled at this path.
        """
        if path not in self._ready:
            resource = self._made(path)
            if len(self._ready) >= MAX_ITEMS:
                self._ready.clear()
            self._ready[path] = resource
        return self._ready[path]

    def _made(self, path: str) -> Resource | None:
        for prefix, kind in _ITEM_PATHS:
            if path.startswith(prefix):
                return self._item(kind, path.removeprefix(prefix))
        return self._makers[path]()

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
    """Return the reference's ETag of all flags: it sees versions only, tombstones included."""
    entries = ((item.key.encode(), item.version) for item in payload.flags.values())
    text = b"".join(b"%b:%d" % entry for entry in sorted(entries))
    digest = hashlib.sha1(text, usedforsecurity=False).hexdigest()
    return b"relay-" + digest[:15].encode()


def _data_etag(payload: Payload) -> bytes:
    """Return a strong ETag: equal for equal data, whatever their order and history."""
    digest = hashlib.sha256()
    for kind in Kind:
        for item in sorted(payload.live(kind), key=lambda item: item.key):
            key, json = item.key.encode(), item.json or b""
            sizes = b"%b %d %d %d " % (kind.value.encode(), len(key), item.version, len(json))
            digest.update(sizes + key)
            digest.update(json)
    return b'"%b"' % digest.hexdigest()[:32].encode()


class PollingHandler:
    """Answers polls at both doors."""

    def __init__(self) -> None:
        self._polls: WeakKeyDictionary[Environment, _Polls] = WeakKeyDictionary()

    def __call__(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the answer at once; None if this is for the application.

        Args:
            environment: whose data.
            path: as on the wire; a query or an escape is the application's business.
            if_none_match: the header; empty if there is none.
            accept_encoding: the header; empty if there is none.
        """
        if "%" in path or "?" in path:
            return None
        return self.answer(environment, path, if_none_match, accept_encoding)

    def answer(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the answer to a poll at once.

        None if there are no data, if nothing is polled there, or if a large body has to be
        compressed first (see `complete`).

        Args:
            environment: whose data.
            path: decoded.
            if_none_match: the header; empty if there is none.
            accept_encoding: the header; empty if there is none.
        """
        found = self._find(environment, path)
        if not isinstance(found, Resource):
            return found
        return with_ttl(found.variant(if_none_match, accept_encoding), environment)

    async def complete(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the answer to a poll; a large body is compressed aside, for the next ones as well.

        The arguments are those of `answer`; None if there are no data, or nothing is polled there.
        """
        found = self._find(environment, path)
        if not isinstance(found, Resource):
            return found
        answer = found.variant(if_none_match, accept_encoding)
        if answer is None:
            answer = await found.compress_in_thread()
        return with_ttl(answer, environment)

    def _find(self, environment: Environment, path: str) -> Resource | PreparedResponse | None:
        if environment.payload is None:
            return None
        try:
            resource = self._polls_of(environment, environment.payload).get(path)
        except KeyError:
            return None
        return resource or NO_SUCH_ITEM.with_headers(*environment_headers(environment.spec))

    def _polls_of(self, environment: Environment, payload: Payload) -> _Polls:
        polls = self._polls.get(environment)
        if polls is None or polls.payload is not payload:
            polls = self._polls[environment] = _Polls(
                payload, environment_headers(environment.spec)
            )
        return polls
