"""Members of a fleet without clients: many in one process, each with environments, mirrors and
connections to Redis of its own, as a relay has them. Their upstream is simulated.

Run as a program this takes the URL of Redis, the number of members, that of environments, and the
data set of these. It takes orders, one JSON object a line, on its standard input, and answers each:
with the numbers of followers, leaders and members alone, or with the CLOCK_MONOTONIC time at which
all members had read all data.
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

from msgspec.structs import replace

from bench import data
from relay.config.schema import Redis
from relay.environment import Environment
from relay.fleet import Role
from relay.fleet.feed import Feed, Keys
from relay.fleet.member import Member
from relay.fleet.mirror import FleetMirror
from relay.fleet.source import FleetSource
from relay.fleet.timings import FleetTimings
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
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


class OneOfMany:
    """One member with all its environments."""

    def __init__(self, url: str, name: str, environments: int, dataset: str) -> None:
        timings, options = FleetTimings(), Redis(url=url)
        quick = replace(options, connect_timeout=timings.answer, read_timeout=timings.answer)
        waiting = replace(options, read_timeout=timings.poll + options.read_timeout)
        self.feed = Feed(*map(connect, (quick, options, waiting)))
        self.member = Member(self.feed, name, LOG, timings)
        self.sources = []
        self.environments = []
        for number in range(environments):
            keys = Keys(f"env-{number}", f"identity-{number}")
            source = FleetSource(self.member, keys, Upstream(dataset), LOG)
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


async def serve(url: str, members: int, environments: int, dataset: str) -> None:
    """Take part, and obey, until standard input ends."""
    names = [f"{socket.gethostname()}-{os.getpid()}-{number}" for number in range(members)]
    many = [OneOfMany(url, name, environments, dataset) for name in names]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = [asyncio.create_task(each.run()) for each in many]
    while line := await reader.readline():
        print(json.dumps(await _obey(many, json.loads(line))), flush=True)
        for task in running:
            if task.done():
                task.result()
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def _obey(many: list[OneOfMany], order: dict[str, float]) -> object:
    if "changes" in order:
        Upstream.pause = 1 / order["changes"]
        Upstream.news.set()
    if "read_at" in order:
        await asyncio.sleep(order["read_at"] - time.monotonic())
        await asyncio.gather(*(each.feed.snapshot(each.sources[0].keys) for each in many))
        return time.monotonic()
    sources = [source for each in many for source in each.sources]
    delivered = [source for source in sources if source.has_delivered]
    return [sum(source.role is role for source in delivered) for role in Role]


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
