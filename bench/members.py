"""Members of a fleet without clients, many in one process; their upstream is simulated.

A *whole* one has for each environment what a relay has: data, source and mirror. A *watching* one
asks of Redis what a follower asks as long as it misses nothing (the looks and the feed, on
connections of its own), and ignores the answers.

Run as a program this takes the URL of Redis, the numbers of members of both kinds, that of
environments, and the data set of these. It takes orders, one JSON object a line, on its standard
input, and answers each: with the numbers of followers, leaders, members alone, and watchers that
have looked, or with the CLOCK_MONOTONIC time at which all members had read all data.
"""

import asyncio
import json
import logging
import os
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
LOG.setLevel(logging.CRITICAL)
CHANGED = "changed"


class Upstream:
    """Source of updates for leaders: everything, then changes of one flag, whoever leads.

    Args:
        dataset: of the environment.
        phase: tells when within each pause it changes.
    """

    protocol = "fdv1"
    began = pause = float("inf")
    """CLOCK_MONOTONIC time since when environments change, and seconds between two changes."""
    news = asyncio.Event()
    """Set once they change."""

    def __init__(self, dataset: str, phase: float) -> None:
        self._flags = data.flags(dataset)
        self._phase = phase
        self.has_delivered = False

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        del basis
        sent = self._version()
        yield ChangeSet((*map(_item, self._flags.values()), self._changed(sent)), full=True)
        self.has_delivered = True
        await self.news.wait()
        while True:
            due = self.began + (sent - self._phase) * self.pause
            await asyncio.sleep(due - time.monotonic())
            sent += 1
            yield ChangeSet((self._changed(sent),))

    def _version(self) -> int:
        """Return the present version of the flag that changes."""
        if not self.news.is_set():
            return 1
        return max(1, 1 + int((time.monotonic() - self.began) / self.pause + self._phase))

    @staticmethod
    def _changed(version: int) -> Item:
        return _item(data.flag(CHANGED, version, data.PATCH_BYTES))

    def resync(self) -> None:
        pass

    def check(self, *, reconnect: bool = False) -> None:
        pass


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
        self.has_looked = False

    def looked(self, look: Look) -> None:
        del look
        self.has_looked = True

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
            upstream = Upstream(dataset, number / environments)
            source = FleetSource(self.member, _keys(number), upstream, LOG)
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
    """Take part, and obey, until the process is killed."""
    members = [_member(url, number) for number in range(whole + watching)]
    complete = [Whole(member, environments, dataset) for member in members[:whole]]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = []
    for each in complete:
        running.append(asyncio.create_task(each.run()))
        while not all(source.has_delivered for source in each.sources):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # one after the other: a process for each would be as fast
    watchers = []
    for member in members[whole:]:
        of_member = [Watcher(_keys(number)) for number in range(environments)]
        watchers += of_member
        for watcher in of_member:
            member.join(watcher)
        running.append(asyncio.create_task(member.run()))
    sources = [source for each in complete for source in each.sources]
    while line := await reader.readline():
        answer = await _obey(json.loads(line), members, sources, watchers)
        print(json.dumps(answer), flush=True)
        for task in running:
            if task.done():
                task.result()


async def _obey(
    order: dict[str, float],
    members: list[Member],
    sources: list[FleetSource],
    watchers: list[Watcher],
) -> object:
    if "changes" in order:
        Upstream.began, Upstream.pause = order["since"], 1 / order["changes"]
        Upstream.news.set()
    if "read_at" in order:
        await asyncio.sleep(order["read_at"] - time.monotonic())
        await asyncio.gather(*(each.feed.snapshot(_keys(0)) for each in members))
        return time.monotonic()
    delivered = [source for source in sources if source.has_delivered]
    roles = [sum(source.role is role for source in delivered) for role in Role]
    return [*roles, sum(watcher.has_looked for watcher in watchers)]


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]))
