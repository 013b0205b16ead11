"""Middleware: normalization of paths before routing, and unexpected exceptions."""

from __future__ import annotations

import logging
import re
from posixpath import normpath
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.model.text import header_value
from relay.web.responses import BAD_ESCAPE, PreparedResponse

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9a-fA-F]{2})")
_UNESCAPED = "/!$&'()*+,;=:@~"

_log = logging.getLogger("relay.web")


class PathNormalizationMiddleware:
    """Middleware that passes on well-formed, canonical paths only (endpoints 1.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, redirect or pass on a request."""
        response = _early_response(scope)
        if response is None:
            await self._app(scope, receive, send)
        else:
            await response.to_starlette()(scope, receive, send)


def _early_response(scope: Scope) -> PreparedResponse | None:
    path: str = scope["path"]
    if path == "*" and scope["method"] == "OPTIONS":
        return PreparedResponse(200)  # addressed to the server itself
    if _BROKEN_ESCAPE.search(scope["raw_path"]):
        return BAD_ESCAPE
    clean = canonical(path)
    if clean == path:
        return None
    location = quote(clean, safe=_UNESCAPED).encode()
    if scope["query_string"]:
        location += b"?" + scope["query_string"]
    return PreparedResponse(301, ((b"location", header_value(location)),))


def canonical(path: str) -> str:
    """Return a path without empty, `.` and `..` segments; a trailing slash stays.

    The result begins with exactly one slash, so that a redirect to it never leaves this host.
    """
    clean = normpath("/" + path.lstrip("/"))
    return clean + "/" if path.endswith("/") and clean != "/" else clean


class ServerErrorMiddleware:
    """Middleware that turns an unexpected exception into a 500, logged once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through; respond with a 500 if that fails."""
        started = False

        async def send_and_mark_started(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_mark_started)
        except Exception:
            if started:
                raise  # too late for a 500; the server logs it and closes the connection
            _log.exception("A request could not be answered because of an unexpected error")
            await PreparedResponse(500).to_starlette()(scope, receive, send)
