"""The spool: durable when it says so, and never blocking the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay import clock
from relay.errors import StoreUnavailable
from relay.events.spool import MAX_QUEUED, DiskSpool, MemorySpool
from relay.events.store import Limits
from relay.model.event import EventPayload
from tests.events.stores import (
    DAY,
    LIMITS,
    OTHER,
    PARTITION,
    payload,
)
from tests.support.clocks import SystemClock
from tests.support.upstream import PATIENCE

ROOT = Path(__file__).parent.parent.parent
ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
"""Number of times that a process is killed; more in the nightly run."""


@contextlib.asynccontextmanager
async def opened(directory, limits=LIMITS, retry=0.01):
    spool = DiskSpool(directory, limits, retry) if directory else MemorySpool(limits)
    async with working(spool):
        yield spool


@contextlib.asynccontextmanager
async def working(spool):
    """The results of a spool that is open for the time of the block."""
    results = []

    async def work():
        async for result in spool.results():
            results.append(result)  # noqa: PERF401 - it is read meanwhile

    task = asyncio.create_task(work())
    await spool.do(lambda _: None)
    try:
        yield results
    finally:
        await spool.close()
        await task


async def append(spool, payload):
    """Append a payload; return whether it was new, once it is safe."""
    stored = spool.append(payload)
    return stored if isinstance(stored, bool) else await stored


async def append_all(spool, *payloads):
    return await asyncio.gather(*(append(spool, each) for each in payloads))


async def take(spool, partition=PARTITION):
    return await spool.do(lambda store: store.take(partition))


async def finish(spool, batch):
    return await spool.do(lambda store: store.finish(batch))


async def drained(spool, partition=PARTITION):
    """Take and finish everything; return the batches with their bodies."""
    batches = []
    while (taken := await take(spool, partition)) is not None:
        batches.append(taken)
        await finish(spool, taken[0])
    return batches


def bodies(batches):
    return [body for _, members in batches for body in members]


# Appending


@pytest.mark.parametrize("durable", [True, False])
async def test_appended_payloads_come_out_once_and_in_order(tmp_path, durable):
    """With and without a directory."""
    async with opened(tmp_path if durable else None) as spool:
        assert spool.durable is durable
        assert await append_all(spool, *(payload(n) for n in range(250))) == [True] * 250
        batches = await drained(spool)
        assert bodies(batches) == [payload(n).body for n in range(250)]
        assert await take(spool) is None


async def test_unfinished_payloads_survive_a_restart(tmp_path):
    """Payloads, the fixed batch and the known ids survive; the backlog is reported."""
    async with opened(tmp_path) as spool:
        await append_all(spool, *(payload(n) for n in range(3)))
        first, _ = await take(spool)
        await append(spool, payload(3))
        await append(spool, payload(4, OTHER))
    spool = DiskSpool(tmp_path, LIMITS)
    async with working(spool) as results:
        backlog = results[0].backlog
        assert {(left.partition, left.payloads) for left in backlog} == {(PARTITION, 4), (OTHER, 1)}
        assert not await append(spool, payload(1))
        batches = await drained(spool)
        assert [batch.payloads for batch, _ in batches] == [3, 1]
        assert batches[0][0].payload_id == first.payload_id
        assert [result.backlog for result in results[1:]] == [None] * (len(results) - 1)


async def test_a_payload_alone_keeps_its_id_and_joined_ones_get_a_new_one():
    """So upstream recognises an SDK's own retry of a payload that was forwarded unchanged."""
    async with opened(None) as spool:
        await append(spool, payload(1))
        alone, _ = await take(spool)
        await append(spool, payload(2))
        assert (await take(spool))[0] == alone, "a fixed batch changed"
        await finish(spool, alone)
        await append(spool, payload(3))
        joined, _ = await take(spool)
        assert alone.payload_id == "id-1"
        assert joined.payloads == 2
        assert joined.payload_id not in {"id-2", "id-3"}


MOMENTS = st.lists(
    st.one_of(
        st.just("append"),
        st.sampled_from(["expire", "take", "restart"]),
        st.floats(-20 * DAY, 20 * DAY),
    ),
    min_size=3,
    max_size=30,
)


@pytest.mark.parametrize("durable", [True, False], ids=["disk", "memory"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moments=MOMENTS)
@example(["append", 8 * DAY, "expire", "append", "restart", "expire"])
@example(
    ["append", -8 * DAY, "expire", "append", "restart", "expire", 8 * DAY, "restart", "expire"]
)
@example(["append", 600.0, *["restart"] * 5, "expire"])
@example([-8 * DAY, "restart", "append", "restart", 8 * DAY, "restart", "expire"])
def test_a_clock_that_jumps_loses_nothing(durable, moments):
    """Whatever it does during a process or between two, every waiting payload is delivered."""

    async def run(folder, system):
        async with contextlib.AsyncExitStack() as process:
            results, count = [], 0

            async def start():
                spool = DiskSpool(folder, LIMITS) if durable else MemorySpool(LIMITS)
                results.append(await process.enter_async_context(working(spool)))
                return spool

            spool = await start()
            for moment in moments:
                if moment == "append":
                    assert await append(spool, payload(count))
                    count += 1
                elif moment == "expire":
                    await spool.do(lambda store: store.expire(clock.now()))
                elif moment == "take":
                    await take(spool)
                elif moment != "restart":
                    system.correct(moment)
                elif durable:
                    await process.aclose()
                    system.restart()
                    spool = await start()
            for number in range(0 if "restart" in moments else count):
                assert not await append(spool, payload(number)), "an id is forgotten"
            assert bodies(await drained(spool)) == [payload(number).body for number in range(count)]
        assert not any(result.evicted for each in results for result in each)

    with tempfile.TemporaryDirectory() as folder, SystemClock() as system:
        asyncio.run(run(Path(folder), system))


@pytest.mark.parametrize("durable", [True, False])
async def test_payloads_that_are_too_old_are_evicted_regularly(tmp_path, monkeypatch, durable):
    """The results tell how many, though nothing else happens."""
    monkeypatch.setattr("relay.events.spool.EXPIRE_EVERY", 0.01)
    limits = Limits(age=1000.0)
    spool = DiskSpool(tmp_path, limits) if durable else MemorySpool(limits)
    with SystemClock() as system:
        async with working(spool) as results:
            await append_all(spool, payload(1), payload(2, OTHER))
            system.skip(500)
            await append(spool, payload(3))
            system.skip(501)
            async with asyncio.timeout(PATIENCE):
                while not any(result.evicted for result in results):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            evicted = [Counter(result.evicted) for result in results if result.evicted]
            assert evicted == [Counter(prod=1, test=1)]
            assert bodies(await drained(spool)) == [payload(3).body]


async def test_evictions_from_memory_are_counted():
    """By environment, in the store."""
    async with opened(None, Limits(memory=5000)) as spool:
        await append_all(spool, *(payload(n, size=1000) for n in range(20)))
        left = await drained(spool)
        assert spool.memory.pop_evicted()["prod"] + len(bodies(left)) == 20
        assert not spool.memory.pop_evicted()
        assert bodies(left)[-1] == payload(19, size=1000).body


# Failures


async def test_a_directory_that_cannot_be_made_is_logged_once(tmp_path, caplog):
    """Events wait in memory, and move to the disk when it works."""
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the directory should be")
    with caplog.at_level(logging.INFO, "relay.events"):
        async with opened(blocked) as spool:
            assert await append(spool, payload(1))
            batch, _ = await take(spool)
            await append_all(spool, *(payload(n) for n in range(2, 5)))
            assert not spool.durable
            assert "File exists" in spool.outage
            blocked.unlink()
            while not spool.durable:
                await append(spool, payload(0, payload_id=""))
            assert (await take(spool))[0].payload_id == batch.payload_id
            assert await finish(spool, batch) == 1
            assert not await append(spool, payload(3)), "known ids move, too"
    texts = [record.getMessage() for record in caplog.records]
    assert [text for text in texts if "memory only" in text] == [texts[0]]
    assert texts[1] == "Events are kept on disk again"
    async with opened(blocked) as spool:
        assert bodies(await drained(spool))[:3] == [payload(n).body for n in range(2, 5)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can make a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_full_disk_loses_no_accepted_payload(small_disk, caplog):
    """Payloads go to memory, finished batches are removed later, and the disk takes all over."""
    with caplog.at_level(logging.INFO, "relay.events"):
        async with opened(small_disk / "spool", Limits(memory=4 << 20), retry=3600) as spool:
            await append(spool, payload(0))
            batch, _ = await take(spool)
            ballast = small_disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            for n in range(1, 100):
                assert await append(spool, payload(n, size=5000))
            assert not spool.durable
            assert await finish(spool, batch) == 1
            ballast.unlink()
            await spool.do(lambda store: store.retry_now())
            assert await append(spool, payload(100))
            assert spool.durable
            found = bodies(await drained(spool))
    assert Counter(found) == Counter(
        [payload(n, size=5000).body for n in range(1, 100)] + [payload(100).body]
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_write_that_fails_moves_to_memory_and_back(tmp_path, connections, caplog):
    """As on a full disk: SQLite may not let its file grow."""
    spool = DiskSpool(tmp_path, LIMITS, retry=3600)
    with caplog.at_level(logging.INFO, "relay.events"):
        async with working(spool) as results:
            await append(spool, payload(0))
            batch, _ = await take(spool)
            await append(spool, payload(1))
            connections[-1].execute("PRAGMA max_page_count=1")
            assert await append(spool, payload(2, size=100_000))
            assert not spool.durable
            assert "full" in spool.outage
            # The batch of the disk is delivered meanwhile; the partition continues with the memory.
            assert await finish(spool, batch) == 1
            taken = await take(spool)
            assert taken[1] == [payload(2, size=100_000).body]
            await spool.do(lambda store: store.retry_now())
            await append(spool, payload(3))
            assert spool.durable
            assert spool.outage is None
            backlogs = [each.backlog for each in results if each.backlog is not None]
            assert [[left.payloads for left in each] for each in backlogs] == [[], [2]]
            # The content of the disk, then the batch that was fixed in memory.
            assert sorted(bodies(await drained(spool))) == sorted(
                payload(n, size=100_000 if n == 2 else 0).body for n in (1, 2, 3)
            )
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_damaged_file_is_set_aside(tmp_path, caplog):
    """It is kept for people; a new one takes its place at once."""
    (tmp_path / "events.db").write_bytes(b"this is no database, as anybody can see" * 100)
    async with opened(tmp_path) as spool:
        assert await append(spool, payload(1))
        assert spool.durable
    assert (tmp_path / "events.db.damaged").read_bytes().startswith(b"this is no database")
    assert "damaged" in caplog.text


async def test_a_file_of_another_release_is_left_alone(tmp_path, caplog):
    """Its events wait for the release that can read them."""
    with contextlib.closing(sqlite3.connect(tmp_path / "events.db")) as other:
        other.execute("PRAGMA user_version=99")
    before = (tmp_path / "events.db").read_bytes()
    async with opened(tmp_path) as spool:
        assert await append(spool, payload(1))
        assert not spool.durable
    assert (tmp_path / "events.db").read_bytes() == before
    assert "another release" in caplog.text


async def test_a_second_process_on_the_same_file_works_in_memory(tmp_path):
    """Two relays cannot deliver the same events."""
    async with opened(tmp_path) as first, opened(tmp_path) as second:
        assert await append(first, payload(1))
        assert await append(second, payload(2))
        assert first.durable
        assert not second.durable
        assert "locked" in second.outage
        assert bodies(await drained(first)) == [payload(1).body]


async def test_only_the_owner_can_read_the_files(tmp_path):
    """The directory and the files have private permissions."""
    async with opened(tmp_path / "new" / "spool") as spool:
        await append(spool, payload(1))
        folder = tmp_path / "new" / "spool"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


async def test_a_disk_that_hangs_blocks_nothing(tmp_path, monkeypatch):
    """The loop continues, waiting payloads are bounded, and the shutdown is in time."""
    monkeypatch.setattr("relay.events.spool.CLOSE_LIMIT", 0.05)
    freed = threading.Event()
    spool = DiskSpool(tmp_path, LIMITS)
    async with working(spool):
        spool.do(lambda _: freed.wait(60))
        big = EventPayload(PARTITION, "", b"x" * (MAX_QUEUED // 4), 1.0)
        waiting = [spool.append(big) for _ in range(4)]
        with pytest.raises(StoreUnavailable):
            spool.append(payload(1))
        started = time.monotonic()
        await spool.close()
        assert time.monotonic() - started < 1
        assert not any(each.done() for each in waiting)
        freed.set()
        await asyncio.gather(*waiting)


@pytest.mark.parametrize("durable", [True, False])
async def test_an_unexpected_error_reaches_its_caller_only(tmp_path, durable):
    """The spool continues to work."""
    async with opened(tmp_path if durable else None) as spool:
        with pytest.raises(ZeroDivisionError):
            await spool.do(lambda _: 1 / 0)
        assert await append(spool, payload(1))
        assert bodies(await drained(spool)) == [payload(1).body]


async def test_a_cancelled_append_keeps_its_payload(tmp_path):
    """A payload is stored even if its sender is gone."""
    async with opened(tmp_path) as spool:
        spool.append(payload(1)).cancel()
        await append(spool, payload(2))
        assert bodies(await drained(spool)) == [payload(1).body, payload(2).body]


async def test_one_synchronisation_serves_many_payloads(tmp_path, connections):
    """Payloads that arrive together share transactions."""
    async with opened(tmp_path) as spool:
        commits = []
        connections[-1].set_trace_callback(lambda sql: sql == "COMMIT" and commits.append(sql))
        await append_all(spool, *(payload(n) for n in range(1000)))
        assert len(commits) < 50


async def test_a_debugger_shows_the_spool_s_file_and_outage(tmp_path):
    """The reason of an outage, or None."""
    size = LIMITS.memory
    assert repr(MemorySpool(LIMITS)) == f"<MemorySpool: <MemoryStore: 0 of {size} bytes, 0 queues>>"
    (tmp_path / "events").write_text("a file in place of the folder")
    async with opened(tmp_path / "events") as spool:
        assert "File exists" in spool.outage
        path = tmp_path / "events" / "events.db"
        assert repr(spool) == f"<DiskSpool: {path}, outage: {spool.outage}>"


CHILD = """
import asyncio, sys, time
from pathlib import Path
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.events.store import Limits
from relay.events.spool import DiskSpool

async def main():
    spool = DiskSpool(Path(sys.argv[1]), Limits())
    async def work():
        async for _ in spool.results():
            pass
    partition = Partition("prod", EventsEndpoint.BULK, 4)
    async def client(name):
        for n in range(10**6):
            text = f"{sys.argv[2]}-{name}-{n}"
            body = b'["%s"]' % text.encode()
            await spool.append(EventPayload(partition, text, body, time.time()))
            print(text, flush=True)
    async def deliver():
        while True:
            if taken := await spool.do(lambda store: store.take(partition)):
                for body in taken[1]:
                    print("sent", taken[0].payload_id, body.decode(), flush=True)
                await spool.do(lambda store: store.finish(taken[0]))
            await asyncio.sleep(0.005)
    await asyncio.gather(work(), deliver(), *(client(c) for c in range(8)))

asyncio.run(main())
"""


async def test_kill_9_loses_no_acknowledged_payload(tmp_path):
    """All acknowledged payloads come out, once or under one id."""
    acknowledged, sent = set(), {}

    def note(payload_id, text):
        sent.setdefault(text, set()).add(payload_id)

    for round_ in range(ROUNDS):
        with (tmp_path / "out").open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", CHILD, tmp_path / "spool", str(round_)),
                cwd=ROOT,
                stdout=out,
            )
            while (tmp_path / "out").stat().st_size < 4000 * (round_ % 10 + 1):
                await asyncio.sleep(0.005)
                assert process.returncode is None
            process.kill()
            await process.wait()
        for line in (tmp_path / "out").read_text().splitlines(keepends=True):
            words = line.split()
            if not line.endswith("\n"):
                continue
            if words[0] == "sent":
                note(words[1], words[2])
            else:
                acknowledged.add(f'["{words[0]}"]')
    async with opened(tmp_path / "spool") as spool:
        for batch, texts in await drained(spool):
            for text in texts:
                note(batch.payload_id, text.decode())
    assert len(acknowledged) > 30 * ROUNDS
    assert acknowledged <= set(sent)
    assert {len(ids) for ids in sent.values()} == {1}
