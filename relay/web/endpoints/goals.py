"""Goals for browsers (endpoints 1.9): an HTTP cache of LaunchDarkly's reply in each environment.

Concurrent requests to an environment share one request to LaunchDarkly. While LaunchDarkly fails,
its last good reply is served.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from urllib.parse import quote
from weakref import WeakKeyDictionary

from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request

from relay import clock
from relay.environment import Environment
from relay.errors import UpstreamUnavailable
from relay.model.reply import Fetch, Reply
from relay.model.text import header_value
from relay.protocol.urls import join
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog
from relay.web.access import Access
from relay.web.requests import header
from relay.web.resources import is_known
from relay.web.responses import PreparedResponse

FETCH_LIMIT = 10.0
"""Seconds to wait for LaunchDarkly: a web page is waiting, too."""

MAX_SIZE = 1024 * 1024
"""Bytes of a reply: an environment has a few goals, of some hundred bytes each."""

MAX_LIFETIME = 24 * 3600.0
"""Maximum seconds for which a reply is fresh, whatever its `max-age`."""

RETRY_AFTER = 5.0
"""Seconds to wait after a failure; the last reply is served meanwhile."""

FORWARDED_HEADERS = ("x-launchdarkly-user-agent", "x-launchdarkly-wrapper", "x-launchdarkly-tags")
"""Request headers that are forwarded to LaunchDarkly."""

RETURNED_HEADERS = ("content-type", "cache-control", "etag", "expires", "last-modified")
"""Headers of LaunchDarkly's reply that are returned to browsers."""

_MAX_AGE = re.compile('(?:^|[ ,])max-age="?([0-9]{1,9})')
_SECONDS = re.compile("[0-9]{1,9}")
_NO_GOALS = PreparedResponse(200, ((b"content-type", b"application/json"),), b"[]")
_UNREACHABLE = Reply(502, {}, b"")
_STATUSES = frozenset(HTTPStatus)


class GoalsHandler:
    """Handler of requests for goals.

    Args:
        fetch: sends a request to LaunchDarkly; None without a network, and so without goals.
        base_uri: of LaunchDarkly's client-side service. ld-relay ignores its path.
    """

    def __init__(self, fetch: Fetch | None = None, base_uri: str = "") -> None:
        self._fetch = fetch
        self._base = base_uri
        self._caches: WeakKeyDictionary[Environment, _GoalsCache] = WeakKeyDictionary()

    async def handle(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a request for the goals of an environment."""
        if self._fetch is None:
            return _NO_GOALS
        environment = access.environment
        identifier = quote(access.grant.credential.value, safe="")
        url = join(self._base, f"/sdk/goals/{identifier}")
        cache = self._caches.get(environment)
        if cache is None or cache.url != url:
            cache = self._caches[environment] = _GoalsCache(self._fetch, url, environment.log)
        forwarded = {name: header(request, name).decode("latin-1") for name in FORWARDED_HEADERS}
        entry = await cache.get({name: value for name, value in forwarded.items() if value})
        return _response(entry, header(request, "if-none-match"))


class _CachedReply(Struct, frozen=True):
    """Reply of LaunchDarkly with its freshness; times are those of the monotonic clock.

    Args:
        reply: of LaunchDarkly.
        confirmed_at: time at which LaunchDarkly sent or confirmed it.
        expires_at: time at which LaunchDarkly must be asked again.
        from_cache: whether it was cached already.
    """

    reply: Reply
    confirmed_at: float
    expires_at: float
    from_cache: bool = False


class _GoalsCache:
    """Cached goals of one environment.

    Args:
        fetch: sends a request to LaunchDarkly.
        url: of the goals.
        log: of the environment.
    """

    def __init__(self, fetch: Fetch, url: str, log: Log) -> None:
        self._fetch = fetch
        self.url = url
        self._outage = OutageLog(log)
        self._current: _CachedReply | None = None
        """Served until it expires; possibly an error."""
        self._last_ok: Reply | None = None
        """Last good reply, to be revalidated, or served in place of a failure."""
        self._last_ok_at = 0.0
        self._fetching: asyncio.Task[_CachedReply] | None = None

    async def get(self, headers: dict[str, str]) -> _CachedReply:
        """Return the goals, from the cache if they are fresh.

        Args:
            headers: of the request to LaunchDarkly, if one is needed.
        """
        if self._current is not None and clock.monotonic() < self._current.expires_at:
            return replace(self._current, from_cache=True)
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._refresh(headers))
            self._fetching.add_done_callback(self._clear_fetching)
        return await asyncio.shield(self._fetching)  # callers may be cancelled

    def _clear_fetching(self, _task: asyncio.Task[_CachedReply]) -> None:
        self._fetching = None

    async def _refresh(self, headers: dict[str, str]) -> _CachedReply:
        etag = self._last_ok.headers.get("etag") if self._last_ok else None
        if etag is not None:
            headers = {**headers, "if-none-match": etag}
        try:
            reply = await self._fetch(
                self.url, headers=headers, within=FETCH_LIMIT, max_body=MAX_SIZE
            )
        except UpstreamUnavailable as e:
            return self._fail(_UNREACHABLE, e.reason)
        confirmed = reply.status == HTTPStatus.NOT_MODIFIED and etag is not None
        if not confirmed and _is_failure(reply):
            return self._fail(reply, f"HTTP error {reply.status}")
        self._outage.end("Goals come from LaunchDarkly again")
        return self._store(reply, confirmed=confirmed)

    def _fail(self, reply: Reply, reason: str) -> _CachedReply:
        """Record a failure; return the last good reply if there is one, the failure otherwise."""
        self._outage.begin(reason, "LaunchDarkly gives no goals: %s", reason)
        now = clock.monotonic()
        if self._last_ok is None:
            served = reply if reply.status in _STATUSES else _UNREACHABLE
            self._current = _CachedReply(served, now, now + RETRY_AFTER)
            return self._current
        self._current = _CachedReply(self._last_ok, self._last_ok_at, now + RETRY_AFTER)
        return replace(self._current, from_cache=True)

    def _store(self, reply: Reply, *, confirmed: bool) -> _CachedReply:
        now = clock.monotonic()
        if confirmed and self._last_ok is not None:
            last = self._last_ok
            reply = Reply(last.status, {**last.headers, **reply.headers}, last.body)
        lifetime = _lifetime(reply)
        if reply.status != HTTPStatus.OK:
            lifetime = RETRY_AFTER
        self._last_ok = reply if reply.status == HTTPStatus.OK and lifetime is not None else None
        self._last_ok_at = now
        entry = _CachedReply(reply, now, now + (lifetime or 0.0), from_cache=confirmed)
        self._current = entry if lifetime else None
        return entry


def _is_failure(reply: Reply) -> bool:
    """Return whether a reply is a failure that may pass, and so says nothing about the goals."""
    retryable = reply.status == HTTPStatus.TOO_MANY_REQUESTS
    return retryable or not (reply.status == HTTPStatus.OK or 400 <= reply.status < 500)  # noqa: PLR2004 - 4xx


def _lifetime(reply: Reply) -> float | None:
    """Return the seconds for which a reply is fresh; None if it must not be stored."""
    control = reply.headers.get("cache-control", "").lower()
    if "no-store" in control:
        return None
    max_age = _MAX_AGE.search(control)
    if max_age is None or "no-cache" in control:
        return 0.0
    age_header = reply.headers.get("age", "")
    age = float(age_header) if _SECONDS.fullmatch(age_header) else 0.0
    return min(max(float(max_age[1]) - age, 0.0), MAX_LIFETIME)


def _response(entry: _CachedReply, if_none_match: bytes) -> PreparedResponse:
    reply = entry.reply
    headers = tuple(
        (name.encode(), header_value(reply.headers[name].encode(errors="surrogateescape")))
        for name in RETURNED_HEADERS
        if name in reply.headers
    )
    if entry.from_cache and reply.status == HTTPStatus.OK:
        age = max(0, int(clock.monotonic() - entry.confirmed_at))
        headers = (*headers, (b"x-from-cache", b"1"), (b"age", b"%d" % age))
    etag = dict(headers).get(b"etag", b"")
    if reply.status == HTTPStatus.OK and etag and is_known(etag, if_none_match):
        return PreparedResponse(304, headers)
    return PreparedResponse(reply.status, headers, reply.body)
