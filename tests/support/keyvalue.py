"""A key-value store behind HTTP, as those at the edge are, for a test to break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import md5
from typing import Self

from aiohttp import web

TOKEN = "a-token-of-the-tests"


class KeyValueServer:
    """`GET` and `PUT` of `/values/KEY` with a bearer token; entered it runs.

    Args:
        etags: whether answers carry an ETag.
        conditions: whether conditional writes are known.
    """

    def __init__(self, *, etags: bool = True, conditions: bool = True) -> None:
        self.values: dict[str, bytes] = {}
        self.requests: list[tuple[str, int]] = []
        """Method of each request, and the status of its answer."""
        self.status = 0
        """Status of every answer; 0 for the right one."""
        self.delay = 0.0
        self.before_put: Callable[[], None] = lambda: None
        """Called when a write has arrived, before it is carried out."""
        self._etags = etags
        self._conditions = conditions
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/values/{{key}}"

    def count(self, method: str) -> int:
        return sum(method == each for each, _ in self.requests)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it, on the port that it had before."""
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/values/{key}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(self.delay)
        response = self._respond(request, body)
        self.requests.append((request.method, response.status))
        return response

    def _respond(self, request: web.Request, body: bytes) -> web.Response:
        key = request.match_info["key"]
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401)
        if self.status:
            return web.Response(status=self.status)
        if request.method == "PUT":
            return self._put(request, key, body)
        if key not in self.values:
            return web.Response(status=404)
        etag = self._etag(key)
        if etag and request.headers.get("If-None-Match") == etag["ETag"]:
            return web.Response(status=304, headers=etag)
        return web.Response(body=self.values[key], headers=etag)

    def _put(self, request: web.Request, key: str, body: bytes) -> web.Response:
        self.before_put()
        if self._conditions and not self._may_put(request, key):
            return web.Response(status=412)
        self.values[key] = body
        return web.Response(headers=self._etag(key))

    def _may_put(self, request: web.Request, key: str) -> bool:
        present = self._etag(key)["ETag"] if key in self.values and self._etags else None
        if "If-Match" in request.headers:
            return request.headers["If-Match"] == present
        return "If-None-Match" not in request.headers or key not in self.values

    def _etag(self, key: str) -> dict[str, str]:
        return {"ETag": f'"{md5(self.values[key]).hexdigest()}"'} if self._etags else {}
