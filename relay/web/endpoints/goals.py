"""The goals of browsers (endpoints 1.9): LaunchDarkly's answer, kept in memory while it is good.

For each environment there is one request to LaunchDarkly at a time, for all who ask meanwhile.
While LaunchDarkly fails, its last answer stays good.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from urllib.parse import quote
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response

from relay.environment import Environment
from relay.errors import UpstreamUnavailable
from relay.model.reply import Fetch, Reply
from relay.model.text import header_value
from relay.protocol.urls import join
from relay.telemetry.log import Log, environment_log
from relay.web.resources import is_known
from relay.web.responses import PreparedResponse
from relay.web.routing import header

FETCH_LIMIT = 10.0
"""Seconds that LaunchDarkly has for its answer: a page waits for it."""

MAX_SIZE = 1024 * 1024
"""Bytes of an answer: an environment has a few goals, of some hundred bytes each."""

MAX_FRESH = 24 * 3600.0
"""Seconds for which an answer is good at most, whatever it says."""

RETRY_AFTER = 5.0
"""Seconds after a failure in which LaunchDarkly is not asked again: pages get what there is."""

PASSED_ON = ("x-launchdarkly-user-agent", "x-launchdarkly-wrapper", "x-launchdarkly-tags")
"""What LaunchDarkly is told of a request."""

PASSED_BACK = ("content-type", "cache-control", "etag", "expires", "last-modified")
"""What a browser is told of LaunchDarkly's answer."""

_MAX_AGE = re.compile('(?:^|[ ,])max-age="?([0-9]{1,9})')
_SECONDS = re.compile("[0-9]{1,9}")
_NONE = PreparedResponse(200, ((b"content-type", b"application/json"),), b"[]")
_UNREACHABLE = Reply(502, {}, b"")
_STATUSES = frozenset(HTTPStatus)


class Goals:
    """Answers requests for goals.

    Args:
        fetch: asks LaunchDarkly; None where there is no network, and so no goals.
        base_uri: of the service that has them. The reference leaves out its path.
    """

    def __init__(self, fetch: Fetch | None = None, base_uri: str = "") -> None:
        self._fetch = fetch
        self._base = base_uri
        self._known: WeakKeyDictionary[Environment, _Goals] = WeakKeyDictionary()

    async def respond(self, request: Request, environment: Environment) -> Response:
        """Answer a request."""
        if self._fetch is None:
            return _NONE.to_starlette()
        goals = self._known.get(environment)
        if goals is None:
            identifier = quote(request.path_params["envId"], safe="")
            url = join(self._base, f"/sdk/goals/{identifier}")
            log = environment_log(environment.spec.name, environment.spec.sdk_key.masked)
            goals = self._known[environment] = _Goals(self._fetch, url, log)
        passed = {name: header(request, name).decode("latin-1") for name in PASSED_ON}
        found = await goals.get({name: value for name, value in passed.items() if value})
        return _answer(found, header(request, "if-none-match")).to_starlette()


@dataclass(frozen=True, slots=True)
class _Found:
    """An answer of LaunchDarkly. Times are of the monotonic clock.

    Args:
        reply: it.
        since: when LaunchDarkly gave or confirmed it.
        until: when LaunchDarkly must be asked again.
        kept: whether it was there already.
    """

    reply: Reply
    since: float
    until: float
    kept: bool = False


class _Goals:
    """The goals of one environment.

    Args:
        fetch: asks LaunchDarkly.
        url: where they are.
        log: of the environment.
    """

    def __init__(self, fetch: Fetch, url: str, log: Log) -> None:
        self._fetch = fetch
        self._url = url
        self._log = log
        self._last: _Found | None = None
        """What is given while it is good, a refusal perhaps."""
        self._good: Reply | None = None
        """What LaunchDarkly last gave, to be confirmed, or given in place of a failure."""
        self._good_since = 0.0
        self._failing = False
        self._fetching: asyncio.Task[_Found] | None = None

    async def get(self, headers: dict[str, str]) -> _Found:
        """Return the goals.

        Args:
            headers: what LaunchDarkly is told if it has to be asked.
        """
        if self._last is not None and time.monotonic() < self._last.until:
            return replace(self._last, kept=True)
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._refresh(headers))
            self._fetching.add_done_callback(self._note_end)
        return await asyncio.shield(self._fetching)  # who asks may go; others wait for the same

    def _note_end(self, _task: asyncio.Task[_Found]) -> None:
        self._fetching = None

    async def _refresh(self, headers: dict[str, str]) -> _Found:
        known = self._good.headers.get("etag") if self._good else None
        if known is not None:
            headers = {**headers, "if-none-match": known}
        try:
            reply = await self._fetch(
                self._url, headers=headers, within=FETCH_LIMIT, max_body=MAX_SIZE
            )
        except UpstreamUnavailable as e:
            return self._fail(_UNREACHABLE, e.reason)
        confirmed = reply.status == HTTPStatus.NOT_MODIFIED and known is not None
        if not confirmed and _is_failure(reply):
            return self._fail(reply, f"HTTP error {reply.status}")
        if self._failing:
            self._failing = False
            self._log.info("Goals come from LaunchDarkly again")
        return self._take(reply, confirmed=confirmed)

    def _fail(self, reply: Reply, reason: str) -> _Found:
        """Note a failure; return the last goals all the same, if there are any."""
        if not self._failing:
            self._failing = True
            self._log.warning("LaunchDarkly gives no goals: %s", reason)
        now = time.monotonic()
        if self._good is None:
            passed = reply if reply.status in _STATUSES else _UNREACHABLE
            self._last = _Found(passed, now, now + RETRY_AFTER)
            return self._last
        self._last = _Found(self._good, self._good_since, now + RETRY_AFTER)
        return replace(self._last, kept=True)

    def _take(self, reply: Reply, *, confirmed: bool) -> _Found:
        now = time.monotonic()
        if confirmed and self._good is not None:
            reply = replace(self._good, headers={**self._good.headers, **reply.headers})
        lasts = _lifetime(reply)
        if reply.status != HTTPStatus.OK:
            lasts = RETRY_AFTER
        self._good = reply if reply.status == HTTPStatus.OK and lasts is not None else None
        self._good_since = now
        found = _Found(reply, now, now + (lasts or 0.0), kept=confirmed)
        self._last = found if lasts else None
        return found


def _is_failure(reply: Reply) -> bool:
    """Whether an answer says nothing about the goals: it may be another one soon."""
    passing = reply.status == HTTPStatus.TOO_MANY_REQUESTS
    return passing or not (reply.status == HTTPStatus.OK or 400 <= reply.status < 500)  # noqa: PLR2004 - 4xx


def _lifetime(reply: Reply) -> float | None:
    """Return for how many seconds an answer is good; None if it must not be kept."""
    control = reply.headers.get("cache-control", "").lower()
    if "no-store" in control:
        return None
    max_age = _MAX_AGE.search(control)
    if max_age is None or "no-cache" in control:
        return 0.0
    age = reply.headers.get("age", "")
    spent = float(age) if _SECONDS.fullmatch(age) else 0.0
    return min(max(float(max_age[1]) - spent, 0.0), MAX_FRESH)


def _answer(found: _Found, if_none_match: bytes) -> PreparedResponse:
    reply = found.reply
    headers = tuple(
        (name.encode(), header_value(reply.headers[name].encode(errors="surrogateescape")))
        for name in PASSED_BACK
        if name in reply.headers
    )
    if found.kept and reply.status == HTTPStatus.OK:
        age = max(0, int(time.monotonic() - found.since))
        headers = (*headers, (b"x-from-cache", b"1"), (b"age", b"%d" % age))
    etag = dict(headers).get(b"etag", b"")
    if reply.status == HTTPStatus.OK and etag and is_known(etag, if_none_match):
        return PreparedResponse(304, headers)
    return PreparedResponse(reply.status, headers, reply.body)
