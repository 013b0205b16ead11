"""Clients of FDv2 that say what they are sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import quote, urlencode

from relay.protocol import sse
from tests.support.process import PATIENCE, RelayProcess
from tests.support.serving import SDK_KEY, Stream, ask, until


def told(events: list[tuple[str, dict]]) -> tuple[str, list[str]]:
    """The intent of a transfer, and the items in it with the versions sent along."""
    intent, *rest = [data for _, data in events]
    names = [f"{data['key']} {data['version']}" for data in rest if "key" in data]
    return intent["payloads"][0]["intentCode"], names


async def poll(
    relay: RelayProcess, basis: str = "", *, payload_filter: str = ""
) -> tuple[str, list[str], str]:
    """Intent, items and state of a poll; the state is empty if it stays."""
    query = {"filter": payload_filter, "basis": basis}
    path = "/sdk/poll?" + urlencode({name: value for name, value in query.items() if value})
    reply = await ask(relay.address, path, [("Authorization", SDK_KEY)])
    if reply.status != 200:
        return f"status {reply.status}", [], ""
    events = [(each["event"], each["data"]) for each in json.loads(reply.body)["events"]]
    return *told(events), events[-1][1].get("state", "")


async def first_transfer(relay: RelayProcess, basis: str) -> tuple[str, list[str]]:
    """Intent and items of the first transfer of a stream."""
    opened = await Stream.open(relay.address, f"/sdk/stream?basis={quote(basis)}")
    try:
        return transfer(await opened.chunk())
    finally:
        opened.close()


def transfer(message: bytes) -> tuple[str, list[str]]:
    """Intent and items of a message of a stream."""
    return told([(each.name, json.loads(each.data)) for each in sse.Decoder().feed(message)])


async def served(relay: RelayProcess, *items: str) -> str:
    """Wait until a relay serves items, among others; return the state."""
    async with asyncio.timeout(PATIENCE):
        while True:
            _, names, state = await poll(relay)
            if set(items) <= set(names):
                return state
            await asyncio.sleep(0.01)


async def written(folder: Path, state: str) -> None:
    """Wait until a snapshot in a folder holds a state."""
    name = state.encode()
    await until(lambda: any(name in file.read_bytes() for file in folder.glob("*.snapshot")))
