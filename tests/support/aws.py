"""AWS as its clients meet it: an endpoint for credentials, and a service that refuses some."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web

SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Variables in which a test machine may have credentials."""

AUTHORIZATION = "token-of-this-container"


def without_credentials(patch: pytest.MonkeyPatch, home: str) -> None:
    """Leave neither variables nor files nor an instance."""
    for name in SOURCES:
        patch.delenv(name, raising=False)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{home}/credentials")
    patch.setenv("AWS_CONFIG_FILE", f"{home}/config")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class _Server:
    """An HTTP server; entered it runs, left it is ended."""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        [address] = self._runner.addresses
        self.url = f"http://127.0.0.1:{address[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raise NotImplementedError


class ContainerCredentials(_Server):
    """The endpoint of a container's credentials, with a new key at each look.

    Args:
        lifetime: seconds for which a key is valid.
    """

    def __init__(self, lifetime: float) -> None:
        self.lifetime = lifetime
        self.given: list[str] = []
        self.is_down = False

    @property
    def variables(self) -> dict[str, str]:
        """Variables by which AWS's tools take their credentials here."""
        return {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.url}/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": AUTHORIZATION,
        }

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let AWS's tools in this process take their credentials here."""
        for name, value in self.variables.items():
            patch.setenv(name, value)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.is_down or request.headers.get("Authorization") != AUTHORIZATION:
            return web.Response(status=500)
        self.given.append(f"AKIA{len(self.given) + 1}")
        expiration = datetime.now(UTC) + timedelta(seconds=self.lifetime)
        return web.json_response(
            {
                "AccessKeyId": self.given[-1],
                "SecretAccessKey": "secret-of-a-container",
                "Token": f"token-{len(self.given)}",
                "Expiration": expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )


class Guard(_Server):
    """Stands before a server of moto, which takes any credentials, and refuses some keys.

    Args:
        url: the server's.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.refused: set[str] = set()
        self.status = 400
        """Of the answers to refused requests."""
        self.keys: list[str] = []
        """Of the requests so far."""
        self.regions: list[str] = []

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        return await super().__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        credential = request.headers["Authorization"].partition("Credential=")[2].split("/")
        self.keys.append(credential[0])
        self.regions.append(credential[2])
        if credential[0] in self.refused:
            body = "" if request.method == "HEAD" else "<Error><Code>ExpiredToken</Code></Error>"
            return web.Response(status=self.status, text=body, content_type="application/xml")
        headers = {n: v for n, v in request.headers.items() if n.lower() != "host"}
        async with self._session.request(
            request.method,
            self._url + request.path_qs,
            data=await request.read(),
            headers=headers,
        ) as answer:
            hop = ("transfer-encoding", "connection", "content-length")
            back: dict[str, Any] = {n: v for n, v in answer.headers.items() if n.lower() not in hop}
            if request.method == "HEAD":
                back["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, body=await answer.read(), headers=back)
