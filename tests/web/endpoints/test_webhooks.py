"""Webhooks reach the environments that exist when they come."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from relay.environment import Environment
from relay.model.credential import SDKKey, Secret
from relay.model.environment import EnvironmentSpec
from relay.model.item import Kind, parse
from relay.model.payload import ChangeSet
from relay.protocol.webhook import sign
from relay.relay import Relay
from relay.streams.hub import Hub
from relay.web.endpoints.webhooks import WebhooksHandler
from tests.support.contracts import ScriptedSource
from tests.support.data import flag
from tests.support.serving import until

SECRET = Secret("a-long-random-text")


class Stage:
    """An environment whose source counts the hints that it gets."""

    def __init__(self, name: str) -> None:
        self.source = ScriptedSource()
        spec = EnvironmentSpec(
            name, SDKKey(f"sdk-{name}"), project_key="shop", environment_key=name
        )
        log = logging.getLogger("relay.env.test")
        self.environment = Environment(spec, self.source, Hub({}), log)

    async def deliver(self, version: int) -> None:
        item = parse(Kind.FLAG, "lamp", json.dumps(flag(version=version)).encode())
        await self.source.give(ChangeSet((item,), full=True))


@asynccontextmanager
async def running(relay: Relay, handler: WebhooksHandler) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(relay.run()), asyncio.create_task(handler.run())]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def post(handler: WebhooksHandler, name: str, version: int) -> int:
    """Send a webhook about a flag; return the status."""
    content = json.dumps(
        {
            "_id": f"{name}-{version}",
            "kind": "flag",
            "accesses": [{"resource": f"proj/shop:env/{name}:flag/lamp"}],
            "currentVersion": {"key": "lamp", "environments": {name: {"version": version}}},
        }
    ).encode()
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": content}

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"x-ld-signature", sign(content, SECRET).encode())]
    await handler({"type": "http", "method": "POST", "headers": headers}, receive, send)
    return sent[0]["status"]


async def test_an_environment_that_came_later_is_checked() -> None:
    """By its present names; one that is gone is left alone, and others notice nothing."""
    first, late = Stage("first"), Stage("late")
    relay = Relay([first.environment], 5)
    handler = WebhooksHandler(relay.environments, [SECRET], recheck_after=(0.01,))
    async with running(relay, handler):
        relay.put(late.environment)
        await late.deliver(1)
        assert await post(handler, "late", 2) == 202
        await until(lambda: late.source.looked == [False, True])
        assert first.source.looked == []
        relay.change(
            late.environment, replace(late.environment.spec, name="new", environment_key="new")
        )
        assert await post(handler, "new", 3) == 202
        await until(lambda: late.source.looked == [False, True] * 2)
        relay.remove(late.environment)
        assert await post(handler, "new", 4) == 202
        await until(lambda: first.source.looked != [])  # it may concern all that are left
        assert late.source.looked == [False, True] * 2


async def test_a_check_ends_when_the_change_has_come() -> None:
    """A later webhook begins anew."""
    stage = Stage("a")
    relay = Relay([stage.environment], 5)
    handler = WebhooksHandler(relay.environments, [SECRET], recheck_after=(0.25,), burst=0.0)
    async with running(relay, handler):
        await stage.deliver(1)
        for version in (2, 3):
            assert await post(handler, "a", version) == 202
            await until(lambda v=version: len(stage.source.looked) == v - 1)
            await stage.deliver(version)
            await asyncio.sleep(0.3)
        assert stage.source.looked == [False, False]
