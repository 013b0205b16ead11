"""What server-side SDKs poll: prepared once per payload and variant, then only looked up."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

from isal import igzip

from relay.environment import Environment
from relay.model.item import Kind
from relay.model.payload import Payload
from relay.protocol.fdv1 import all_data, all_flags
from relay.web.responses import NO_SUCH_ITEM, Headers, PreparedResponse, environment_headers

MIN_COMPRESSED = 1024
"""Bytes of a body worth compressing: below, it fits one packet anyway."""

MAX_COMPRESSED_AT_ONCE = 256 * 1024
"""Bytes that are compressed on the event loop, in about 1 ms; more is done in a thread."""

COMPRESSION_LEVEL = 1
"""isal's 1 of 0 to 3: nearly as small as 3, and fast."""

MAX_ITEMS = 1024
"""Single flags and segments kept ready per environment; PHP asks for few, again and again."""

_ITEM_PATHS = (("/sdk/flags/", Kind.FLAG), ("/sdk/segments/", Kind.SEGMENT))
_NO_KEYS = ("", ".", "..")
"""What stands in place of a key when a path is not canonical: the application redirects it."""
_QUOTED = re.compile(rb'(?:W/)?"([^"]*)"')


def template(path: str) -> str:
    """Return the route of a poll, such as `/sdk/flags/{key}`."""
    for prefix, _ in _ITEM_PATHS:
        if path.startswith(prefix):
            return prefix + "{key}"
    return path


class Resource:
    """One body with its ETag, in all its variants.

    Args:
        pieces: of the body, in JSON.
        etag: as it is sent.
        headers: beside the usual ones, of all variants.
    """

    def __init__(self, pieces: tuple[bytes, ...], etag: bytes, headers: Headers) -> None:
        self.pieces = pieces
        self.size = sum(map(len, pieces))
        self.etag = etag
        self.compressible = self.size >= MIN_COMPRESSED
        self._headers = headers
        self.compressed: PreparedResponse | None = None
        self._compression: asyncio.Future[PreparedResponse] | None = None

    @property
    def _shared(self) -> Headers:
        vary: Headers = ((b"vary", b"Accept-Encoding"),) if self.compressible else ()
        return ((b"etag", self.etag), *self._headers, *vary)

    @property
    def _typed(self) -> Headers:
        return ((b"content-type", b"application/json"), *self._shared)

    @property
    def body(self) -> bytes:
        """The body in one piece."""
        return b"".join(self.pieces)

    @property
    def plain(self) -> PreparedResponse:
        """The variant that is not compressed."""
        return PreparedResponse(200, self._typed, self.body)

    @cached_property
    def unchanged(self) -> PreparedResponse:
        """What a client is told that has it."""
        return PreparedResponse(304, self._shared)

    @property
    def to_compress(self) -> int:
        """The bytes that `compress` would have to look at."""
        return self.size

    def matches(self, if_none_match: bytes) -> bool:
        """Whether the client has this."""
        return is_known(self.etag, if_none_match)

    def compress(self) -> PreparedResponse:
        """Return the gzip variant. May run in a thread."""
        if self.compressed is None:
            # Without a time the bytes are equal at all replicas.
            body = igzip.compress(self.body, COMPRESSION_LEVEL, mtime=0)
            self.compressed = self.compressed_answer(body)
        return self.compressed

    def compressed_answer(self, body: bytes) -> PreparedResponse:
        """Return the variant with a compressed body."""
        return PreparedResponse(200, (*self._typed, (b"content-encoding", b"gzip")), body)

    async def compress_in_thread(self) -> PreparedResponse:
        """Compress in a thread, once for all who ask meanwhile."""
        if self._compression is None:
            self._compression = asyncio.ensure_future(asyncio.to_thread(self.compress))
        # Who asks may go; others wait for the same.
        return await asyncio.shield(self._compression)

    def variant(self, if_none_match: bytes, accept_encoding: bytes) -> PreparedResponse | None:
        """Return what answers these headers; None while it waits to be compressed aside."""
        if if_none_match and self.matches(if_none_match):
            return self.unchanged
        if not (self.compressible and accepts_gzip(accept_encoding)):
            return self.plain
        if self.to_compress <= MAX_COMPRESSED_AT_ONCE:
            return self.compress()
        return self.compressed


def is_known(etag: bytes, if_none_match: bytes) -> bool:
    """Whether a client has what an ETag names: old exact form, list, `W/`, `*` (endpoints 1.6).

    Args:
        etag: as it is sent.
        if_none_match: the client's header; empty if there is none.
    """
    if if_none_match in (etag, b"*"):
        return True
    return etag.removeprefix(b"W/").strip(b'"') in _QUOTED.findall(if_none_match)


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


@lru_cache(maxsize=256)
def accepts_gzip(accept_encoding: bytes) -> bool:
    """Whether an `Accept-Encoding` header prefers gzip to nothing, or likes it as much."""
    weights: dict[bytes, float] = {}
    for part in accept_encoding.lower().split(b","):
        name, _, parameter = part.partition(b";")
        weights[name.strip()] = _weight(parameter.replace(b" ", b""))
    gzip = weights.get(b"gzip", weights.get(b"*", 0.0))
    return gzip > 0 and gzip >= weights.get(b"identity", 0.0)


def _weight(parameter: bytes) -> float:
    if not parameter:
        return 1.0
    try:
        return float(parameter.removeprefix(b"q="))
    except ValueError:
        return 0.0


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


def with_ttl(answer: PreparedResponse | None, environment: Environment) -> PreparedResponse | None:
    """Return an answer with the time until which caches may keep it, if there is one."""
    ttl = environment.spec.ttl
    if answer is None or ttl <= 0:
        return answer
    expires = formatdate(time.time() + ttl, usegmt=True).encode()
    return answer.with_headers((b"vary", b"Authorization"), (b"expires", expires))
