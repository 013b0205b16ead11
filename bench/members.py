"""Members of a fleet without clients, many in one process; their upstream is simulated.

A *whole* one has for each environment what a relay has: data, source and mirror. A *watching* one
asks of Redis what a follower asks as long as it misses nothing (the looks and the feed, on
connections of its own), and ignores the answers.

Run as a program this takes the URL of Redis, the numbers of members of both kinds, that of
environments, and the data set of these. It takes orders, one JSON object a line, on its standard
input, and answers each: with the numbers of followers, leaders and members alone, or with the
CLOCK_MONOTONIC time at which all members had read all data.
"""

import asyncio
import json
import logging
import os
import random
import socket
import sys
import time
from collections.abc import AsyncGenerator

import uvloop
from msgspec.structs import replace

from bench import data
from relay.config.schema import Redis
from relay.environment import Environment
from relay.fleet import Role
from relay.fleet.feed import Feed, Keys, Look
from relay.fleet.member import Member
from relay.fleet.mirror import FleetMirror
from relay.fleet.source import FleetSource
from relay.fleet.timings import FleetTimings
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol.feed import Entry
from relay.sources import Update
from relay.stores import Mirror
from relay.stores.redis.connect import connect
from relay.streams.hub import Hub

LOG = logging.getLogger("relay.env.bench")
CHANGED = data.flag_key(0)


class Upstream:
    """What leaders listen to: everything, then changes of one flag at a pace that all share."""

    protocol = "fdv1"
    pause = float("inf")
    """Seconds between two changes of an environment."""
    news = asyncio.Event()
    """Set once there is a pace."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self.has_delivered = False

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        del basis
        flags = data.flags(self._dataset) | {CHANGED: _changed()}
        yield ChangeSet(tuple(map(_item, flags.values())), full=True)
        self.has_delivered = True
        await self.news.wait()
        due = time.monotonic() + self.pause * random.random()
        while True:
            await asyncio.sleep(due - time.monotonic())
            due += self.pause
            yield ChangeSet((_item(_changed()),))

    def resync(self) -> None:
        pass

    def check(self, *, reconnect: bool = False) -> None:
        pass


def _changed() -> dict[str, object]:
    """The flag that changes, in a version that no leader has given to an earlier one."""
    return data.flag(CHANGED, time.time_ns() // 1_000_000, data.PATCH_BYTES)


def _item(flag: dict[str, object]) -> Item:
    return Item(Kind.FLAG, str(flag["key"]), int(str(flag["version"])), data.compact(flag))


def _member(url: str, number: int) -> Member:
    timings, options = FleetTimings(), Redis(url=url)
    quick = replace(options, connect_timeout=timings.answer, read_timeout=timings.answer)
    waiting = replace(options, read_timeout=timings.poll + options.read_timeout)
    feed = Feed(*map(connect, (quick, options, waiting)))
    return Member(feed, f"{socket.gethostname()}-{os.getpid()}-{number}", LOG, timings)


def _keys(number: int) -> Keys:
    return Keys(f"env-{number}", f"identity-{number}")


class Watcher:
    """Ignores what happens to an environment."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def looked(self, look: Look) -> None:
        pass

    def read(self, place: str, entry: Entry) -> None:
        pass

    def fell_silent(self) -> None:
        pass

    def denied(self, reason: str) -> None:
        raise AssertionError(reason)


class Whole:
    """A member with all its environments."""

    def __init__(self, member: Member, environments: int, dataset: str) -> None:
        self.member = member
        self.sources = []
        self.environments = []
        for number in range(environments):
            source = FleetSource(self.member, _keys(number), Upstream(dataset), LOG)
            spec = EnvironmentSpec(f"env-{number}", SDKKey(f"sdk-bench-{number}"))
            environment = Environment(spec, source, Hub({}), LOG)
            source.held = lambda held=environment: held.payload  # type: ignore[misc]
            mirror = FleetMirror(self.member, source, lambda: 0, _no_mirror, LOG, server="bench")
            environment.mirrors = (mirror,)
            self.sources.append(source)
            self.environments.append(environment)

    async def run(self) -> None:
        """Take part."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.member.run())
            for environment in self.environments:
                tasks.create_task(environment.run())


def _no_mirror() -> Mirror:
    raise AssertionError("there is a fleet")


async def serve(url: str, whole: int, watching: int, environments: int, dataset: str) -> None:
    """Take part, and obey, until standard input ends."""
    members = [_member(url, number) for number in range(whole + watching)]
    complete = [Whole(member, environments, dataset) for member in members[:whole]]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = [asyncio.create_task(each.run()) for each in complete]
    for member in members[whole:]:
        for number in range(environments):
            member.join(Watcher(_keys(number)))
        running.append(asyncio.create_task(member.run()))
    sources = [source for each in complete for source in each.sources]
    while line := await reader.readline():
        print(json.dumps(await _obey(json.loads(line), members, sources)), flush=True)
        for task in running:
            if task.done():
                task.result()
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def _obey(
    order: dict[str, float], members: list[Member], sources: list[FleetSource]
) -> object:
    if "changes" in order:
        Upstream.pause = 1 / order["changes"]
        Upstream.news.set()
    if "read_at" in order:
        await asyncio.sleep(order["read_at"] - time.monotonic())
        await asyncio.gather(*(each.feed.snapshot(_keys(0)) for each in members))
        return time.monotonic()
    delivered = [source for source in sources if source.has_delivered]
    return [sum(source.role is role for source in delivered) for role in Role]


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]))
