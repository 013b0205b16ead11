"""A relay as an SDK under test, for LaunchDarkly's sdk-test-harness (fdv2 13.9).

Each "client" of the harness is a relay whose upstream is the harness' mock of LaunchDarkly, and
which is asked by HTTP, as SDKs ask. So the harness tests how a relay follows upstream.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import logging
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay import __version__
from relay.backoff import Backoff
from relay.environment import Environment
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.relay import Relay
from relay.server.options import ServerOptions
from relay.sources.fdv2 import FDv2Source
from relay.sources.polling import PollingSource
from relay.sources.timings import SourceTimings
from relay.streams.hub import Hub
from relay.upstream import Upstream
from relay.web.handlers import Handlers
from tests.support.serving import serving_site, site_of

CAPABILITIES = ["server-side", "server-side-polling", "fdv1-fallback"]

NOWHERE = "http://127.0.0.1:9"
"""Where a relay polls that is to have no initialiser: nobody listens there."""

MAX_PATIENCE = 60.0
"""Seconds for which a client waits for data at the most; one case asks for a year."""

LOG = logging.getLogger("relay.env.harness")


class Client:
    """One relay.

    Args:
        configuration: as the harness describes an SDK.
    """

    def __init__(self, configuration: dict[str, Any]) -> None:
        self._configuration = configuration
        self._running = AsyncExitStack()
        self._session: aiohttp.ClientSession
        self._port = 0

    async def start(self) -> bool:
        """Start it; return whether it has data in time."""
        configuration = self._configuration
        key = SDKKey(configuration["credential"])
        self._session = await self._running.enter_async_context(aiohttp.ClientSession())
        upstream = await self._running.enter_async_context(Upstream())
        source = _source(configuration.get("dataSystem") or {}, upstream, key)
        environment = Environment(EnvironmentSpec("harness", key), source, Hub({}), LOG)
        relay = Relay([environment], 0)
        site = serving_site(site_of(Handlers.of(relay)), ServerOptions(0))
        self._port = await self._running.enter_async_context(site)
        patience = (configuration.get("startWaitTimeMs") or 5000) / 1000
        try:
            async with asyncio.timeout(min(patience, MAX_PATIENCE)):
                await environment.init_done.wait()
        except TimeoutError:
            return False
        return environment.payload is not None

    async def stop(self) -> None:
        await self._running.aclose()

    async def evaluate(self, what: dict[str, Any]) -> dict[str, Any]:
        """Return a flag's value, or the default."""
        flag = (await self._flags(what)).get(what["flagKey"])
        if flag is None or flag["value"] is None:
            return {"value": what["defaultValue"]}
        return {"value": flag["value"], "variationIndex": flag["variation"]}

    async def evaluate_all(self, what: dict[str, Any]) -> dict[str, Any]:
        """Return the values of all flags."""
        flags = await self._flags(what)
        return {"state": {key: flag["value"] for key, flag in flags.items()} | {"$valid": True}}

    async def _flags(self, what: dict[str, Any]) -> dict[str, Any]:
        context = json.dumps(what.get("context") or what.get("user"))
        segment = base64.urlsafe_b64encode(context.encode()).decode()
        url = f"http://127.0.0.1:{self._port}/sdk/evalx/contexts/{segment}"
        headers = {"Authorization": self._configuration["credential"]}
        async with self._session.get(url, headers=headers) as response:
            flags: dict[str, Any] = await response.json() if response.ok else {}
            return flags


def _source(system: dict[str, Any], upstream: Upstream, key: SDKKey) -> FDv2Source:
    """Return the source that comes closest to a data system of the harness."""
    initialisers = system.get("initializers") or []
    synchronisers = system.get("synchronizers") or []
    streams = [each["streaming"] for each in synchronisers if each.get("streaming")]
    # A relay has one address for polls: that of the beginning if a stream continues.
    sources = (*initialisers, *synchronisers) if streams else (*synchronisers, *initialisers)
    polls = [each["polling"] for each in sources if each.get("polling")]
    fdv1 = system.get("fdv1Fallback") or {"baseUri": NOWHERE}
    delays = [each["initialRetryDelayMs"] for each in streams if each.get("initialRetryDelayMs")]
    intervals = [each["pollIntervalMs"] for each in (*polls, fdv1) if each.get("pollIntervalMs")]
    timings = SourceTimings(
        retry=Backoff(first=delays[0] / 1000 if delays else 1.0, longest=30.0, growth=1.25),
        poll_interval=min(intervals, default=30_000) / 1000,
    )
    return FDv2Source(
        upstream,
        polls[0]["baseUri"] if polls else NOWHERE,
        streams[0]["baseUri"] if streams else None,
        key,
        make_fdv1=lambda: PollingSource(upstream, fdv1["baseUri"], key, timings),
        log=LOG,
        timings=timings,
    )


class Service:
    """The service that the harness talks to."""

    def __init__(self) -> None:
        self._clients: dict[int, Client] = {}
        self._numbers = itertools.count(1)

    @property
    def app(self) -> Starlette:
        """Its ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._describe, methods=["GET"]),
                Route("/", self._create, methods=["POST"]),
                Route("/clients/{number:int}", self._command, methods=["POST"]),
                Route("/clients/{number:int}", self._delete, methods=["DELETE"]),
            ]
        )

    async def _describe(self, _: Request) -> Response:
        return JSONResponse(
            {"name": "relay", "clientVersion": __version__, "capabilities": CAPABILITIES}
        )

    async def _create(self, request: Request) -> Response:
        configuration = (await request.json())["configuration"]
        client = Client(configuration)
        if not await client.start() and not configuration.get("initCanFail"):
            await client.stop()
            return Response("no data in time", 500)
        number = next(self._numbers)
        self._clients[number] = client
        return Response(status_code=201, headers={"Location": f"/clients/{number}"})

    async def _command(self, request: Request) -> Response:
        client, command = self._clients[request.path_params["number"]], await request.json()
        match command["command"]:
            case "evaluate":
                return JSONResponse(await client.evaluate(command["evaluate"]))
            case "evaluateAll":
                return JSONResponse(await client.evaluate_all(command["evaluateAll"]))
            case "flushEvents":
                return Response(status_code=202)
        return Response("this is no SDK", 400)

    async def _delete(self, request: Request) -> Response:
        await self._clients.pop(request.path_params["number"]).stop()
        return Response(status_code=204)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--log-level", default="warning")
    options = parser.parse_args()
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(message)s")
    uvicorn.run(Service().app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
