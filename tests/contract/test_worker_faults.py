"""Processes of a relay are killed and stopped, again and again, under posts, polls and streams.

What each client has seen is recorded, and checked as a whole at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.contract.test_workers import WorkersRelay, all_connected
from tests.support.data import all_data, flag
from tests.support.serving import SDK_KEY, Stream, ask, until
from tests.support.upstream import ScriptedUpstream

FAULTS = int(os.environ.get("WORKER_FAULTS", "4"))
"""Faults in a row; at night more: WORKER_FAULTS=100."""

STREAMS = 6

REPORTED = 1.5
"""Seconds after which what a process has counted is known to others, and survives its kill."""

SILENCE = 30.0
"""Seconds after which a client gives a stream up."""

GONE = (OSError, AssertionError, TimeoutError, asyncio.IncompleteReadError, ValueError, IndexError)
"""Errors that a client meets when the process that serves it dies."""

AUTHORIZED = (("Authorization", SDK_KEY),)

VERSION = re.compile(rb'"key":\s*"lamp",\s*"version":\s*([0-9]+)')


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(version=1)))
        yield upstream


class History:
    """History of clients: versions seen by connection, and posts that were acknowledged."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.acknowledged: set[str] = set()
        self.ended = 0
        """Number of streams that have ended."""

    def note(self, connection: str, body: bytes) -> None:
        self.seen[connection] += map(int, VERSION.findall(body))

    def check(self) -> None:
        """No connection has ever gone back in version."""
        back = {name: seen for name, seen in self.seen.items() if seen != sorted(seen)}
        assert not back
        assert len(self.seen) > STREAMS
        assert all(self.seen.values())


class Load:
    """Clients of a relay: streams, polls on connections that stay open, and posts of events.

    Args:
        relay: which they use.
        upstream: whose flag changes meanwhile.
    """

    def __init__(self, relay: WorkersRelay, upstream: ScriptedUpstream) -> None:
        self.history = History()
        self.version = 1
        self.open = 0
        """Number of streams that are open."""
        self._relay = relay
        self._upstream = upstream
        self._is_ending = False

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(STREAMS):
                tasks.create_task(self._stream(number))
            for number in range(3):
                tasks.create_task(self._poll(number))
                tasks.create_task(self._post(number))
            changing = tasks.create_task(self._change())
            yield
            self._is_ending = True
            await changing

    async def _change(self) -> None:
        while not self._is_ending:
            self.version += 1
            changed = flag(version=self.version)
            self._upstream.serve(SDK_KEY, all_data(changed))
            await self._upstream.patch(SDK_KEY, changed)
            await asyncio.sleep(0.05)

    async def _stream(self, number: int) -> None:
        """Follow a stream; open it again when it ends, as SDKs do."""
        for attempt in self._attempts():
            await asyncio.sleep(0.05)
            name = f"stream {number}.{attempt}"
            with suppress(*GONE):
                stream = await Stream.open(self._relay.address)
                self.open += 1
                try:
                    await self._follow(stream, name)
                finally:
                    self.open -= 1
                    self.history.ended += not self._is_ending
                    stream.close()

    async def _follow(self, stream: Stream, name: str) -> None:
        """Record what comes; there may be silence while the feeder is replaced."""
        message = b""
        while not self._is_ending:
            async with asyncio.timeout(SILENCE):
                size = int(await stream.reader.readuntil(b"\r\n"), 16)
                message += (await stream.reader.readexactly(size + 2))[:-2]
            assert size, "the stream has ended"
            if message.endswith(b"\n\n"):
                self.history.note(name, message)
                message = b""

    async def _poll(self, number: int) -> None:
        request = f"GET /sdk/latest-all HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n"
        for attempt in self._attempts():
            await asyncio.sleep(0.05)
            with suppress(*GONE):
                reader, writer = await self._relay.address.connect()
                try:
                    while not self._is_ending:
                        writer.write(request.encode())
                        async with asyncio.timeout(10):
                            head = await reader.readuntil(b"\r\n\r\n")
                            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
                            body = await reader.readexactly(int(length[1] if length else 0))
                        assert head.split()[1] == b"200"
                        self.history.note(f"poll {number}.{attempt}", body)
                        await asyncio.sleep(0.02)
                finally:
                    writer.close()

    async def _post(self, number: int) -> None:
        """Post events; repeat a post with its ID until it is acknowledged, as SDKs do."""
        for count in self._attempts():
            key = f"{number}.{count}"
            body = json.dumps([{"kind": "identify", "key": key}]).encode()
            headers = (
                *AUTHORIZED,
                ("X-LaunchDarkly-Event-Schema", "4"),
                ("X-LaunchDarkly-Payload-ID", f"id-{key}"),
            )
            while key not in self.history.acknowledged and not self._is_ending:
                with suppress(*GONE):
                    address = self._relay.address
                    reply = await ask(
                        address, "/bulk", headers, method="POST", body=body, patience=5
                    )
                    if reply.status == 202:
                        self.history.acknowledged.add(key)
                await asyncio.sleep(0.02)

    def _attempts(self) -> Iterator[int]:
        number = 0
        while not self._is_ending:
            yield number
            number += 1


async def streams_of_workers(relay: WorkersRelay, load: Load) -> list[int]:
    """Wait until all streams are open and counted; return their number at each worker."""
    async with asyncio.timeout(30):
        while True:
            status = await relay.until_status(all_connected)
            counts = [worker["streams"] for worker in status["workers"]]
            if sum(counts) == load.open == STREAMS and status["status"] == "healthy":
                return counts
            await asyncio.sleep(0.1)


async def disturb(relay: WorkersRelay, chance: random.Random, number: int) -> int | None:
    """Kill or stop a worker or the feeder; return the worker that was replaced, if one was."""
    index = chance.choice((None, 0, 1)) if number > 3 else (None, 0)[number % 2]
    kills = number % 4 < 2
    pid = relay.feeder() if index is None else (await relay.pids())[index]
    if kills:
        os.kill(pid, signal.SIGKILL)
        if index is None:
            await until(lambda: relay.feeder() != pid, 15)
        return index
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(0.3, 2.0))  # less than after what it is replaced
    os.kill(pid, signal.SIGCONT)
    return None


@pytest.mark.timing
@pytest.mark.timeout(3600)
async def test_a_history_of_faults_breaks_nothing(tmp_path: Path, upstream) -> None:
    """Nothing acknowledged is lost or doubled, streams of other workers go on, nothing goes back."""
    chance = random.Random(FAULTS)
    (tmp_path / "spool").mkdir()
    spool = {"EVENTS_SPOOL_DIR": str(tmp_path / "spool")}
    async with WorkersRelay(tmp_path, upstream, **spool) as relay:
        load = Load(relay, upstream)
        async with load.run():
            for number in range(FAULTS):
                streams = await streams_of_workers(relay, load)
                counters, ended = await relay.counters(), load.history.ended
                await asyncio.sleep(REPORTED)
                replaced = await disturb(relay, chance, number)
                await streams_of_workers(relay, load)
                lost = 0 if replaced is None else streams[replaced]
                assert load.history.ended - ended == lost, f"fault {number}"
                after = await relay.counters()
                lower = {name: v for name, v in counters.items() if after.get(name, 0) < v}
                assert not lower, f"fault {number}"
        history = load.history
        history.check()
        assert len(history.acknowledged) > FAULTS
        await until(lambda: history.acknowledged <= delivered(upstream).keys(), 30)
        doubled = {key: ids for key, ids in delivered(upstream).items() if len(ids) > 1}
        assert not doubled, relay.log
        reply = await ask(relay.address, "/sdk/latest-all", AUTHORIZED, patience=5)
        assert VERSION.findall(reply.body) == [str(load.version).encode()]


def delivered(upstream: ScriptedUpstream) -> dict[str, list[str]]:
    """The payload IDs with which each event has come: LaunchDarkly takes each ID once."""
    found: dict[str, list[str]] = defaultdict(list)
    taken: set[str] = set()
    for post in upstream.accepted:
        if post.payload_id not in taken:
            taken.add(post.payload_id)
            for event in post.events:
                if event["kind"] == "identify":
                    found[event["key"]].append(post.payload_id)
    return found
