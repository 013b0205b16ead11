"""The one HTTP session towards LaunchDarkly: headers, proxy, trusted CAs, redirects, errors.

aiohttp's exceptions end here. Nothing that leaves holds a key or a proxy's password.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from relay import __version__
from relay.errors import RETRYABLE_4XX, ErrorKind, UpstreamRefused, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.model.event import Receipt
from relay.model.reply import Reply
from relay.proxies import ProxyChoice, basic_authorization, environment_proxies, fixed_proxy
from relay.reasons import describe, shorten, tls_reason
from relay.tls import client_context

USER_AGENT = f"PythonRelay/{__version__} LDRelay/{__version__}"
"""In the shape that LaunchDarkly reads: SDK, then relay (streams 2.4)."""

CONNECT_TIMEOUT = 13.0
"""Seconds for name, TCP, proxy and TLS together: the reference's 3 s and 10 s."""

HEAD_TIMEOUT = 30.0
"""Seconds until an answer must begin, redirects included. Whoever streams begins at once; a server
that is silent for so long has accepted the connection and hangs."""

KEEP_UNUSED = 90.0
"""Seconds for which a connection is kept for the next request (newer 10.2)."""

KEEPALIVE_IDLE = 60
"""Seconds of silence before TCP probes the other side (streams 2.4)."""

MAX_REDIRECTS = 10
"""More is a loop."""

MAX_BODY = 128 * 1024 * 1024
"""Bytes of one answer, decompressed: as much as one message of a stream may have."""

READ_BUFFER = 256 * 1024
"""Bytes read ahead of us: a few wake-ups for a large put instead of dozens."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SAY_NOTHING_OF_THE_KEY = RETRYABLE_4XX | {400}
_MEANINGS = {401: "invalid SDK key", 403: "SDK key not permitted"}
_OK = frozenset({200})
_SECONDS = re.compile("[0-9]{1,9}")
_USERINFO = re.compile("[^/ ']*@")


class Upstream:
    """Requests to LaunchDarkly. The session is made by the first request, in its event loop.

    Args:
        proxy: URL of the proxy for everything, maybe with userinfo; None to follow `HTTP_PROXY`,
            `HTTPS_PROXY` and `NO_PROXY` as they are now.
        ca_files: PEM files of authorities that are trusted beside the system's.
        keep_alive: seconds for which an unused connection is kept; 0 for not at all.
        connect_timeout: seconds until a connection must stand.
        head_timeout: seconds until an answer that is read bit by bit must begin.

    Raises:
        ConfigError: a CA file, the proxy's URL or one of these variables cannot be used.
    """

    def __init__(
        self,
        proxy: str | None = None,
        ca_files: Sequence[Path] = (),
        keep_alive: float = KEEP_UNUSED,
        connect_timeout: float = CONNECT_TIMEOUT,
        head_timeout: float = HEAD_TIMEOUT,
    ) -> None:
        self._proxy_for: ProxyChoice = (
            environment_proxies(os.environ) if proxy is None else fixed_proxy(proxy)
        )
        # Without files it can wait: reading the system's authorities takes its time.
        self._tls = _tls_context(ca_files) if ca_files else None
        self._keep_alive = keep_alive
        self._connect_timeout = connect_timeout
        self._head_timeout = head_timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. The next request would begin anew."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def get(
        self,
        url: str,
        key: SDKKey,
        *,
        accept: str,
        read_timeout: float,
        headers: dict[str, str] | None = None,
        statuses: Collection[int] = _OK,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for `url` and follow redirects; the answer is read within the context.

        Args:
            url: what to get.
            key: goes to this host and to no other.
            accept: the media type wanted.
            read_timeout: seconds of silence that are an error.
            headers: beside the usual ones.
            statuses: those which are an answer; any other is an error.

        Raises:
            UpstreamRefused: the key is refused.
            UpstreamUnavailable: anything else, also while the answer is read.
        """
        everything = {
            "Authorization": key.value,
            "User-Agent": USER_AGENT,
            "Accept": accept,
            "Accept-Encoding": "gzip",
            "Cache-Control": "no-cache",
            **(headers or {}),
        }
        # ValueError: headers and URLs may hold what cannot be sent. While the answer is read it
        # would be a defect of ours.
        with _translated(ValueError):
            async with asyncio.timeout(self._head_timeout):
                response, trusted = await self._open(URL(url), everything, read_timeout)
        try:
            if response.status not in statuses:
                raise _status_error(response.status, trusted=trusted)
            with _translated():
                yield response
        finally:
            response.close()  # what is left unread is not worth reading

    async def post(
        self, url: str, body: bytes, *, headers: dict[str, str], within: float
    ) -> Receipt:
        """Send `body`, follow no redirect, and return whatever is answered.

        Args:
            url: where to.
            body: as it goes out.
            headers: beside the usual ones; with the key, where there is one.
            within: seconds for everything.

        Raises:
            UpstreamUnavailable: there is no answer.
        """
        everything = {"User-Agent": USER_AGENT, "Accept-Encoding": "gzip", **headers}
        limit = aiohttp.ClientTimeout(total=within, connect=self._connect_timeout)
        with _translated(ValueError):
            async with await self._ask(
                "POST", URL(url), everything, limit, data=body, skip_auto_headers=("Accept",)
            ) as response:
                said = response.headers
                date = _http_date(said.get("Date"))
                return Receipt(response.status, date, _retry_after(said.get("Retry-After"), date))

    async def fetch(
        self, url: str, *, headers: dict[str, str], within: float, max_body: int
    ) -> Reply:
        """Ask for `url`, which needs no key, follow redirects, and return whatever is answered.

        Args:
            url: what to get.
            headers: beside the usual ones; redirects to other servers do not take them along.
            within: seconds for everything.
            max_body: bytes of the answer that are an error.

        Raises:
            UpstreamUnavailable: there is no answer.
        """
        usual = {
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
            "Cache-Control": "no-cache",
        }
        with _translated(ValueError):
            async with asyncio.timeout(within):
                response, _ = await self._open(URL(url), {**usual, **headers}, within)
                try:
                    body = await read_body(response, max_body)
                finally:
                    response.close()
        said: dict[str, str] = {}
        for name, value in response.headers.items():
            said.setdefault(name.lower(), value)
        return Reply(response.status, said, body)

    async def _open(
        self, url: URL, headers: dict[str, str], read_timeout: float
    ) -> tuple[aiohttp.ClientResponse, bool]:
        """Return the answer at the end of all redirects, and whether its server got the key."""
        trusted = True
        for _ in range(MAX_REDIRECTS):
            response = await self._request(url, headers, read_timeout)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response, trusted
            response.close()
            target = _redirected(url, location)
            if not _same_server(url, target):
                trusted, headers = False, _without_secrets(headers)
            url = target
        raise UpstreamUnavailable(
            ErrorKind.ERROR_RESPONSE, f"more than {MAX_REDIRECTS} redirects", response.status
        )

    async def _request(
        self, url: URL, headers: dict[str, str], read_timeout: float
    ) -> aiohttp.ClientResponse:
        limit = aiohttp.ClientTimeout(
            total=None, connect=self._connect_timeout, sock_read=read_timeout
        )
        return await self._ask("GET", url, headers, limit)

    async def _ask(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        limit: aiohttp.ClientTimeout,
        **more: Any,
    ) -> aiohttp.ClientResponse:
        """Send one request, through its proxy if it has one, and return the answer's head."""
        url, headers = _with_credentials(url, headers)
        proxy = self._proxy_for(url)
        if proxy is not None:
            more["proxy"] = proxy.url
            authorization = {"Proxy-Authorization": proxy.authorization}
            if not proxy.authorization:
                pass
            elif url.scheme == "https":
                more["proxy_headers"] = authorization  # it is the tunnel's, not upstream's to see
            else:
                headers = headers | authorization
        return await self._opened().request(
            method,
            url,
            headers=headers,
            allow_redirects=False,
            ssl=self._tls_for(url, proxy.url if proxy else None),
            timeout=limit,
            **more,
        )

    def _tls_for(self, *urls: URL | None) -> ssl.SSLContext | bool:
        """Return the context for a connection; where none is encrypted it need not be made."""
        if self._tls is None and any(url and url.scheme == "https" for url in urls):
            self._tls = _tls_context()
        return self._tls or True

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._new_session()
        return self._session

    def _new_session(self) -> aiohttp.ClientSession:
        # No limit of connections: each source has one at a time, and the forwarder of events a few
        # for each environment, so environments are the limit.
        connector = aiohttp.TCPConnector(
            limit=0,
            socket_factory=_keepalive_socket,
            force_close=self._keep_alive <= 0,
            keepalive_timeout=self._keep_alive if self._keep_alive > 0 else None,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER,
            trust_env=False,  # it would read ~/.netrc, too
        )


async def read_body(response: aiohttp.ClientResponse, max_body: int = MAX_BODY) -> bytes:
    """Return the whole body of an answer; call it within `Upstream.get`.

    Raises:
        UpstreamUnavailable: it has more than `max_body` bytes.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > max_body:
            raise UpstreamUnavailable(
                ErrorKind.INVALID_DATA, f"the answer is longer than {max_body} bytes"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _http_date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None


def _retry_after(text: str | None, now: float | None) -> float | None:
    """Read seconds, or a date by the clock of the server."""
    if not text:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    date = _http_date(text)
    return None if date is None or now is None else max(0.0, date - now)


def _status_error(status: int, *, trusted: bool) -> UpstreamUnavailable:
    """Only a server that was shown the key can refuse it."""
    meaning = _MEANINGS.get(status)
    reason = f"HTTP error {status}" + (f" ({meaning})" if meaning else "")
    refused = trusted and 400 <= status < 500 and status not in _SAY_NOTHING_OF_THE_KEY  # noqa: PLR2004 - 4xx
    kind = UpstreamRefused if refused else UpstreamUnavailable
    return kind(ErrorKind.ERROR_RESPONSE, reason, status)


@contextmanager
def _translated(*more: type[Exception]) -> Iterator[None]:
    failures: tuple[type[Exception], ...] = (aiohttp.ClientError, OSError, *more)
    try:
        yield
    except failures as e:
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, _reason(e)) from e


def _reason(error: Exception) -> str:
    """Say what happened, without the texts of libraries that may hold URLs and headers."""
    match error:
        case aiohttp.ClientHttpProxyError():
            reason = f"the proxy answers {error.status}"
        case aiohttp.ClientConnectorCertificateError():
            why = describe(error.certificate_error)
            reason = f"the certificate of {error.host} is not trusted: {why}"
        case aiohttp.ClientConnectorError():
            tls = tls_reason(error.os_error)
            why = f"TLS failed: {tls}" if tls else describe(error.os_error)
            reason = f"cannot connect to {error.host}:{error.port}: {why}"
        case aiohttp.ConnectionTimeoutError():
            reason = "no connection in time"
        case TimeoutError():
            reason = "no answer in time"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | OSError():
            reason = _end_reason(error)
        case aiohttp.ClientResponseError():
            # What follows the first words of the parser's message is what the server has sent.
            why = shorten(error.message.partition("\n")[0].partition("'")[0]).rstrip(": ")
            reason = "the answer is not HTTP" + (f": {why}" if why else "")
        case aiohttp.InvalidURL():
            reason = "the URL cannot be used"
        case _:
            reason = f"the request failed: {_USERINFO.sub('', describe(error))}"
    return reason


def _end_reason(error: Exception) -> str:
    """Say how a connection ended before the answer did."""
    tls = tls_reason(error)
    if tls:
        return f"TLS failed: {tls}"
    if isinstance(error, aiohttp.ClientPayloadError) and "content-encoding" in str(error):
        return "the answer cannot be decompressed"
    if isinstance(error, aiohttp.ClientOSError) and error.errno:
        return f"the connection broke: {describe(error)}"
    return "the server closed the connection"


def _redirected(url: URL, location: str) -> URL:
    try:
        return url.join(URL(location))
    except ValueError as e:
        raise UpstreamUnavailable(
            ErrorKind.ERROR_RESPONSE, "the target of a redirect is not a URL"
        ) from e


def _with_credentials(url: URL, headers: dict[str, str]) -> tuple[URL, dict[str, str]]:
    """Return the URL without user and password, and the headers, perhaps with these.

    As with Go (net/http, `Client.send`), they count where no other credential is sent: a key stands
    above them. What needs none, such as goals and events of browsers, is sent with them.
    """
    basic = basic_authorization(url)
    if not basic:
        return url, headers
    return url.with_user(None), {"Authorization": basic, **headers}


def _same_server(one: URL, other: URL) -> bool:
    """Whether a key given to `one` may be given to `other`: itself, or itself made secure."""
    if one.origin() == other.origin():
        return True
    return one.host == other.host and (one.scheme, other.scheme) == ("http", "https")


def _without_secrets(headers: dict[str, str]) -> dict[str, str]:
    kept = ("User-Agent", "Accept", "Accept-Encoding", "Cache-Control")
    return {name: headers[name] for name in kept}


def _tls_context(ca_files: Sequence[Path] = ()) -> ssl.SSLContext:
    context = client_context(ca_files)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _keepalive_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    return made
