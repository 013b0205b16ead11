"""The HTTP session for all requests to LaunchDarkly: headers, proxies, TLS, redirects, errors.

aiohttp's exceptions are translated here. No error contains a key or a proxy's password.
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

from yarl import URL

from relay import __version__
from relay.errors import RETRYABLE_4XX, ErrorKind, UpstreamRefused, UpstreamUnavailable
from relay.imports import system_authorities_skipped
from relay.model.credential import Credential
from relay.model.event import Receipt
from relay.model.reply import Reply
from relay.proxies import ProxyChoice, basic_authorization, environment_proxies, fixed_proxy
from relay.reasons import describe, shorten, tls_reason
from relay.tls import client_context

with system_authorities_skipped():
    # At import it makes contexts of its own, which takes 40 ms. Requests here bring theirs.
    import aiohttp

Response = aiohttp.ClientResponse
"""Response to `Upstream.get`: status and headers, and a body to read."""

USER_AGENT = f"PythonRelay/{__version__} LDRelay/{__version__}"
"""In the form that LaunchDarkly parses: SDK first, then relay (streams 2.4)."""

CONNECT_TIMEOUT = 13.0
"""Seconds for name resolution, TCP, proxy and TLS together: the sum of ld-relay's 3 s and 10 s."""

HEAD_TIMEOUT = 30.0
"""Seconds until a response must begin, redirects included. Streams begin at once; a server that is
silent for this long has accepted the connection and hangs."""

KEEP_UNUSED = 90.0
"""Seconds for which an idle connection is kept open (newer 10.2)."""

KEEPALIVE_IDLE = 60
"""Seconds of silence before TCP sends keep-alive probes (streams 2.4)."""

MAX_REDIRECTS = 10
"""Redirects to follow; more are taken for a loop."""

MAX_BODY = 128 * 1024 * 1024
"""Maximum size of a decompressed response in bytes, as for one message of a stream."""

READ_BUFFER = 256 * 1024
"""Size of the read buffer in bytes: a large put takes a few wake-ups instead of dozens."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NOT_REFUSALS = RETRYABLE_4XX | {400}
_STATUS_TEXTS = {401: "invalid SDK key", 403: "SDK key not permitted"}
_OK = frozenset({200})
_SECONDS = re.compile("[0-9]{1,9}")
_USERINFO = re.compile("[^/ ']*@")


class Upstream:
    """HTTP client for LaunchDarkly. The first request creates the session, in its event loop.

    Args:
        proxy: URL of the proxy for all requests, optionally with userinfo; None to use the current
            values of `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.
        ca_files: PEM files of authorities to trust in addition to those of the system.
        keep_alive: seconds for which an idle connection is kept open; 0 to close it immediately.
        connect_timeout: seconds for establishing a connection.
        head_timeout: seconds until the response to `get` must begin.

    Raises:
        ConfigError: a CA file, the proxy's URL or one of these variables is unusable.
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
        # Without CA files, create it on first use: loading the system's authorities is slow.
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
        """Close all connections. A later request would create a new session."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def get(
        self,
        url: str,
        key: Credential,
        *,
        accept: str,
        read_timeout: float,
        headers: dict[str, str] | None = None,
        statuses: Collection[int] = _OK,
    ) -> AsyncIterator[Response]:
        """Request `url` and follow redirects; read the response within the context.

        Args:
            url: URL to get.
            key: SDK key, or that of automatic configuration; sent to this host only.
            accept: media type to accept.
            read_timeout: maximum seconds of silence.
            headers: additional headers.
            statuses: accepted statuses; any other is an error.

        Raises:
            UpstreamRefused: the key was refused.
            UpstreamUnavailable: any other failure, also while the response is read.
        """
        all_headers = {
            "Authorization": key.value,
            "User-Agent": USER_AGENT,
            "Accept": accept,
            "Accept-Encoding": "gzip",
            "Cache-Control": "no-cache",
            **(headers or {}),
        }
        # Invalid headers and URLs raise ValueError here. While the response is read, a ValueError
        # would be an unexpected error, so it is not translated there.
        with _translate_errors(ValueError):
            async with asyncio.timeout(self._head_timeout):
                response, has_key = await self._get_following_redirects(
                    URL(url), all_headers, read_timeout
                )
        try:
            if response.status not in statuses:
                raise _status_error(response, has_key=has_key)
            with _translate_errors():
                yield response
        finally:
            response.close()  # do not read the rest just to reuse the connection

    async def post(
        self, url: str, body: bytes, *, headers: dict[str, str], within: float
    ) -> Receipt:
        """Send `body` and return the receipt, whatever its status. Redirects are not followed.

        Args:
            url: URL to post to.
            body: bytes to send.
            headers: additional headers, including the credential if one is needed.
            within: total timeout in seconds.

        Raises:
            UpstreamUnavailable: there was no response.
        """
        unsent = ("Accept",)
        async with self._exchange(
            "POST", url, body, headers, within, skip_auto_headers=unsent
        ) as response:
            response_headers = response.headers
            date = _http_date(response_headers.get("Date"))
            return Receipt(
                response.status, date, _retry_after(response_headers.get("Retry-After"), date)
            )

    async def put(self, url: str, body: bytes, *, headers: dict[str, str], within: float) -> Reply:
        """Put `body` and return the reply without its body, whatever its status; no redirects.

        Args:
            url: URL to put to.
            body: bytes to send.
            headers: additional headers, including the credential if one is needed.
            within: total timeout in seconds.

        Raises:
            UpstreamUnavailable: there was no response.
        """
        async with self._exchange("PUT", url, body, headers, within) as response:
            return Reply(response.status, first_headers(response), b"")

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        url: str,
        body: bytes,
        headers: dict[str, str],
        within: float,
        **options: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a body; yield the response, whatever its status. Redirects are not followed."""
        all_headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "gzip", **headers}
        timeout = aiohttp.ClientTimeout(total=within, connect=self._connect_timeout)
        with _translate_errors(ValueError):
            async with await self._send(
                method, URL(url), all_headers, timeout, data=body, **options
            ) as response:
                yield response

    async def fetch(
        self, url: str, *, headers: dict[str, str], within: float, max_body: int
    ) -> Reply:
        """Request `url` without a key, follow redirects, and return the reply, whatever its status.

        Args:
            url: URL to get.
            headers: additional headers; not sent to other servers after a redirect.
            within: total timeout in seconds.
            max_body: maximum size of the response in bytes.

        Raises:
            UpstreamUnavailable: there was no response, or it is too long.
        """
        defaults = {
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
            "Cache-Control": "no-cache",
        }
        with _translate_errors(ValueError):
            async with asyncio.timeout(within):
                response, _ = await self._get_following_redirects(
                    URL(url), {**defaults, **headers}, within
                )
                try:
                    body = await read_body(response, max_body)
                finally:
                    response.close()
        return Reply(response.status, first_headers(response), body)

    async def _get_following_redirects(
        self, url: URL, headers: dict[str, str], read_timeout: float
    ) -> tuple[Response, bool]:
        """Return the final response, and whether its server received the key."""
        has_key = True
        for _ in range(MAX_REDIRECTS):
            response = await self._request(url, headers, read_timeout)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response, has_key
            response.close()
            target = _redirect_target(url, location)
            if not _is_same_server(url, target):
                has_key, headers = False, _without_secrets(headers)
            url = target
        raise UpstreamUnavailable(
            ErrorKind.ERROR_RESPONSE, f"more than {MAX_REDIRECTS} redirects", response.status
        )

    async def _request(self, url: URL, headers: dict[str, str], read_timeout: float) -> Response:
        timeout = aiohttp.ClientTimeout(
            total=None, connect=self._connect_timeout, sock_read=read_timeout
        )
        return await self._send("GET", url, headers, timeout)

    async def _send(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
        **options: Any,
    ) -> Response:
        """Send one request, through a proxy if one applies; return once the headers arrive."""
        url, headers = _with_credentials(url, headers)
        proxy = self._proxy_for(url)
        if proxy is not None:
            options["proxy"] = proxy.url
            authorization = {"Proxy-Authorization": proxy.authorization}
            if not proxy.authorization:
                pass
            elif url.scheme == "https":
                options["proxy_headers"] = authorization  # for the tunnel, not for upstream
            else:
                headers = headers | authorization
        return await self._get_session().request(
            method,
            url,
            headers=headers,
            allow_redirects=False,
            ssl=self._tls_for(url, proxy.url if proxy else None),
            timeout=limits,
            **options,
        )

    def _tls_for(self, *urls: URL | None) -> ssl.SSLContext | bool:
        """Return the TLS context; it is created only if one of the URLs needs TLS."""
        if self._tls is None and any(url and url.scheme == "https" for url in urls):
            self._tls = _tls_context()
        return self._tls or True

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._new_session()
        return self._session

    def _new_session(self) -> aiohttp.ClientSession:
        # No connection limit: each source has one connection at a time, and the event forwarder a
        # few per environment, so the number of environments is the limit.
        connector = aiohttp.TCPConnector(
            limit=0,
            socket_factory=_make_socket,
            force_close=self._keep_alive <= 0,
            keepalive_timeout=self._keep_alive if self._keep_alive > 0 else None,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER,
            trust_env=False,  # it would also read ~/.netrc
        )


async def read_body(response: Response, max_body: int = MAX_BODY) -> bytes:
    """Return the whole body of a response. Call it within `Upstream.get`.

    Raises:
        UpstreamUnavailable: the body is longer than `max_body` bytes.
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


def first_headers(response: Response) -> dict[str, str]:
    """Return the headers by name in lower case; of a repeated one the first."""
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        headers.setdefault(name.lower(), value)
    return headers


def _http_date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None


def _retry_after(text: str | None, now: float | None) -> float | None:
    """Return the seconds of a `Retry-After` header; dates are relative to the server's clock."""
    if not text:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    date = _http_date(text)
    return None if date is None or now is None else max(0.0, date - now)


def _status_error(response: Response, *, has_key: bool) -> UpstreamUnavailable:
    """Return the error for a status. Only a server that has received the key can refuse it."""
    status = response.status
    text = _STATUS_TEXTS.get(status)
    reason = f"HTTP error {status}" + (f" ({text})" if text else "")
    refused = has_key and 400 <= status < 500 and status not in _NOT_REFUSALS  # noqa: PLR2004 - 4xx
    kind = UpstreamRefused if refused else UpstreamUnavailable
    return kind(ErrorKind.ERROR_RESPONSE, reason, status, first_headers(response))


@contextmanager
def _translate_errors(*extra: type[Exception]) -> Iterator[None]:
    failures: tuple[type[Exception], ...] = (aiohttp.ClientError, OSError, *extra)
    try:
        yield
    except failures as e:
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, reason_of(e)) from e


def reason_of(error: Exception) -> str:
    """Return the reason of an error of aiohttp, without texts that may contain URLs and headers."""
    match error:
        case aiohttp.ClientHttpProxyError():
            reason = f"the proxy answers {error.status}"
        case aiohttp.ClientConnectorCertificateError():
            detail = describe(error.certificate_error)
            reason = f"the certificate of {error.host} is not trusted: {detail}"
        case aiohttp.ClientConnectorError():
            tls = tls_reason(error.os_error)
            detail = f"TLS failed: {tls}" if tls else describe(error.os_error)
            reason = f"cannot connect to {error.host}:{error.port}: {detail}"
        case aiohttp.ConnectionTimeoutError():
            reason = "no connection in time"
        case TimeoutError():
            reason = "no answer in time"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | OSError():
            reason = _disconnect_reason(error)
        case aiohttp.ClientResponseError():
            # The rest of the parser's message quotes the server's response.
            detail = shorten(error.message.partition("\n")[0].partition("'")[0]).rstrip(": ")
            reason = "the answer is not HTTP" + (f": {detail}" if detail else "")
        case aiohttp.InvalidURL():
            reason = "the URL cannot be used"
        case _:
            reason = f"the request failed: {_USERINFO.sub('', describe(error))}"
    return reason


def _disconnect_reason(error: Exception) -> str:
    """Return why a connection ended before the response was complete."""
    tls = tls_reason(error)
    if tls:
        return f"TLS failed: {tls}"
    if isinstance(error, aiohttp.ClientPayloadError) and "content-encoding" in str(error):
        return "the answer cannot be decompressed"
    if isinstance(error, aiohttp.ClientOSError) and error.errno:
        return f"the connection broke: {describe(error)}"
    return "the server closed the connection"


def _redirect_target(url: URL, location: str) -> URL:
    try:
        return url.join(URL(location))
    except ValueError as e:
        raise UpstreamUnavailable(
            ErrorKind.ERROR_RESPONSE, "the target of a redirect is not a URL"
        ) from e


def _with_credentials(url: URL, headers: dict[str, str]) -> tuple[URL, dict[str, str]]:
    """Move user and password of the URL into the headers, unless these have a credential.

    As in Go (net/http, `Client.send`), an SDK key takes precedence. Requests without a key, such as
    goals and events of browsers, are sent with user and password.
    """
    authorization = basic_authorization(url)
    if not authorization:
        return url, headers
    return url.with_user(None), {"Authorization": authorization, **headers}


def _is_same_server(source: URL, target: URL) -> bool:
    """Return whether `target` may get a key for `source`: same server, or its HTTPS version."""
    if source.origin() == target.origin():
        return True
    return source.host == target.host and (source.scheme, target.scheme) == ("http", "https")


def _without_secrets(headers: dict[str, str]) -> dict[str, str]:
    harmless = ("User-Agent", "Accept", "Accept-Encoding", "Cache-Control")
    return {name: headers[name] for name in harmless}


def _tls_context(ca_files: Sequence[Path] = ()) -> ssl.SSLContext:
    context = client_context(ca_files)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _make_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    return sock
