"""Snapshots on disk: atomic, of known age, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import random
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import clock
from relay.model.credential import SDKKey
from relay.model.item import Item, Kind
from relay.model.journal import Journal
from relay.model.payload import EMPTY, Change, Payload
from relay.protocol import snapshot as snapshot_format
from relay.protocol.snapshot import HEADER_SIZE
from relay.stores.snapshot import SnapshotMirror, SnapshotTimings
from tests.support.strategies import change_sets

ROOT = Path(__file__).parent.parent.parent
LOG = logging.getLogger("relay.env.test")
KEY = SDKKey("sdk-5ca1ab1e-0001")
MS = 0.001
FAST = SnapshotTimings(gather=MS, bytes_per_second=1e12, retry=5 * MS, finish=5)
AT_THE_END = SnapshotTimings(gather=3600, bytes_per_second=1, retry=3600, finish=5)
"""Timings with which only the end of a run writes."""


def flag(key, version, size=0):
    return Item(Kind.FLAG, key, version, b'{"version":%d,"x":"%s"}' % (version, b"x" * size))


def payload(*items):
    return Payload.of(items or (flag("a", 1),))


def snapshot(directory, key=KEY, timings=FAST, payload_filter="", journal=None):
    return SnapshotMirror(
        Path(directory), key, LOG, timings, payload_filter=payload_filter, journal=journal
    )


@contextlib.asynccontextmanager
async def running(mirror):
    """Run a mirror; cancel it at the end."""
    task = asyncio.create_task(mirror.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def save(directory, data, **options):
    """Write a payload; return the path of the file."""
    mirror = snapshot(directory, **options)
    async with running(mirror):
        mirror.update(data, None)
        async with asyncio.timeout(20):
            await mirror.flushed()
    return mirror._file.path


async def load(directory, **options):
    return await snapshot(directory, **options).load()


async def until(condition):
    """Wait until the condition is true."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a file gives no sign
            await asyncio.sleep(MS)


async def test_confirmed_data_is_there_after_a_restart(tmp_path):
    """All items with their versions, tombstones, and the time of the confirmation."""
    data = payload(
        flag("a", 3), Item(Kind.FLAG, "gone", 7, None), Item(Kind.SEGMENT, "s", 1, b"{}")
    )
    begin = time.monotonic()
    await save(tmp_path, data)
    stored = await load(tmp_path)
    assert set(stored.payload) == set(data)
    assert 0 <= stored.age <= time.monotonic() - begin + 0.1  # two clocks


@pytest.mark.parametrize(
    ("written", "read", "age"),
    [
        (2_000_000_000, 2_000_000_000 + 7, 7),
        (2_000_000_000, 2_000_000_000 + 8 * 86400, 8 * 86400),
        (2_000_000_000, 2_000_000_000 - 5, 0),  # kept right by small steps
        (2_000_000_000 + 8 * 86400, 2_000_000_000, None),  # was wrong when it was written
        (2_000_000_000, 1000, None),  # has not been set yet
        (1000, 2_000_000_000, None),  # had not been set yet
    ],
)
async def test_an_impossible_age_is_unknown(tmp_path, written, read, age):
    """The clock may be wrong when a snapshot is written or read; its data is used anyway."""
    try:
        clock.use(unix=lambda: written)
        await save(tmp_path, payload(flag("a", 1)))
        clock.use(unix=lambda: read)
        stored = await load(tmp_path)
    finally:
        clock.use()
    assert (stored.age, len(stored.payload)) == (age, 1)


async def test_the_journal_is_there_after_a_restart(tmp_path):
    """With the data that it was written for, even if it had no name for them yet."""
    journal, data = Journal("environment"), payload(flag("a", 3))
    journal.record(data, Change((), (), replace=True), full=True)
    assert journal.naming is not None
    await save(tmp_path, data, journal=journal)
    stored = await load(tmp_path)
    assert stored.journal == journal.saved(data)
    assert stored.journal.states == [(journal.state, 1)]
    await save(tmp_path, payload(flag("a", 4)), journal=journal)
    assert (await load(tmp_path)).journal is None


async def test_a_relay_that_ends_early_names_the_state(tmp_path):
    """The last write has the journal, too."""
    journal, data = Journal("environment"), payload(flag("a", 3))
    journal.record(data, Change((), (), replace=True), full=True)
    mirror = snapshot(tmp_path, timings=AT_THE_END, journal=journal)
    async with running(mirror):
        await asyncio.sleep(0)
        mirror.update(data, None)
    assert (await load(tmp_path)).journal == journal.saved(data)


numbers = st.sampled_from(["1e21", "-0", "1.0", "9007199254740993", "1e400", "1" * 40])
texts = st.text(max_size=8).map(json.dumps)
json_values = st.recursive(
    numbers | texts | st.sampled_from(["null", "true", '"\u2028"']),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[ {', '.join(parts)}]")
        | st.dictionaries(texts, inner, max_size=3).map(
            lambda members: "{" + ",".join(f"{k} :{v}" for k, v in members.items()) + " }"
        )
    ),
    max_leaves=6,
)
any_items = st.builds(
    Item,
    st.sampled_from(Kind),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.integers(-(2**70), 2**70),
    st.none() | json_values.map(lambda value: f'{{"x": {value}}}'.encode()),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(change_sets, max_size=4), st.lists(any_items, max_size=6))
def test_loaded_data_equals_the_last_update(changes, items):
    """For any changes, keys, versions and JSON of items."""

    async def there_and_back(directory):
        mirror = snapshot(directory)
        data = EMPTY
        async with running(mirror):
            for change_set in changes:
                data, change = data.apply(change_set)
                mirror.update(data, change)
            data = Payload.of([*data, *items])
            mirror.update(data, None)
            await mirror.flushed()
        return data, await load(directory)

    with tempfile.TemporaryDirectory() as directory:
        data, stored = asyncio.run(there_and_back(directory))
    assert set(stored.payload) == set(data)
    assert stored.payload.size == data.size


async def test_an_empty_environment_is_data(tmp_path):
    """An environment without flags is not the same as no snapshot."""
    await save(tmp_path, EMPTY)
    assert len((await load(tmp_path)).payload) == 0


async def test_without_a_file_nothing_is_loaded_or_logged(tmp_path, caplog):
    """This is normal at the first start."""
    assert await load(tmp_path / "none") is None
    assert caplog.text == ""


async def test_nobody_else_can_read_it(tmp_path):
    """Directory and file are private; the SDK key is in neither name nor content."""
    path = await save(tmp_path / "new", payload())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KEY.value not in path.name
    assert KEY.value.encode() not in path.read_bytes()


async def test_it_is_bound_to_its_environment(tmp_path, caplog):
    """The file of another SDK key is not used, even if it is renamed."""
    theirs = await save(tmp_path / "theirs", payload(), key=SDKKey("sdk-other"))
    ours = await save(tmp_path / "ours", payload())
    assert theirs.name != ours.name
    theirs.replace(ours)
    assert await load(tmp_path / "ours") is None
    assert "it belongs to another environment" in caplog.text
    await save(tmp_path / "ours", payload(flag("a", 2)))
    assert (await load(tmp_path / "ours")).payload.get(Kind.FLAG, "a").version == 2


async def test_a_file_of_another_release_is_not_used(tmp_path, caplog):
    """After a downgrade it is not reported as damaged, and the next write replaces it."""
    path = await save(tmp_path, payload())
    path.write_bytes(path.read_bytes().replace(b"relay snapshot 2 ", b"relay snapshot 9 ", 1))
    assert await load(tmp_path) is None
    assert "another release" in caplog.text
    await save(tmp_path, payload())
    assert await load(tmp_path)


@pytest.mark.parametrize(
    "part", ["header", "body", "cut", "cut header", "empty", "longer", "other"]
)
async def test_a_damaged_file_is_reported_set_aside_and_not_used(tmp_path, caplog, part):
    """One line is logged; only the last damaged file is kept."""
    for _ in range(2):
        path = await save(tmp_path, payload())
        data = bytearray(path.read_bytes())
        if part == "header":
            data[60] ^= 1
        elif part == "body":
            data[-9] ^= 1
        else:
            sizes = {"cut": len(data) - 5, "cut header": 99, "empty": 0}
            del data[sizes.get(part, len(data)) :]
        data += b"[]\n" if part == "longer" else b""
        path.write_bytes(b"something else" if part == "other" else data)
        caplog.clear()
        assert await load(tmp_path) is None
        assert caplog.text.count(": damaged: ") == len(caplog.records) == 1
        assert [entry.suffix for entry in tmp_path.iterdir()] == [".damaged"]
        assert await load(tmp_path) is None
        assert len(caplog.records) == 1


@pytest.mark.parametrize("where", range(0, HEADER_SIZE, 37))
async def test_no_bit_of_the_first_line_can_flip_unnoticed(tmp_path, where):
    """Not even in the time or the blanks."""
    path = await save(tmp_path, payload())
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    assert await load(tmp_path) is None


async def test_changes_in_quick_succession_are_one_write(tmp_path):
    """The file is replaced once and contains the last change."""
    mirror = snapshot(tmp_path, timings=SnapshotTimings(gather=0.1, bytes_per_second=1e12))
    async with running(mirror):
        for version in range(50):
            mirror.update(payload(flag("a", version)), None)
            await asyncio.sleep(0)
        await until(lambda: list(tmp_path.glob("*.snapshot")))
        inode = next(tmp_path.glob("*.snapshot")).stat().st_ino
        assert (await load(tmp_path)).payload.get(Kind.FLAG, "a").version == 49
    assert next(tmp_path.glob("*.snapshot")).stat().st_ino == inode


async def test_a_large_environment_that_changes_all_the_time_does_not_wear_the_disk(tmp_path):
    """The time between two writes grows with the size."""
    mirror = snapshot(
        tmp_path, timings=SnapshotTimings(gather=MS, bytes_per_second=100_000, finish=5)
    )
    begin = time.monotonic()
    async with running(mirror):
        inodes = set()
        for version in range(10**6):
            mirror.update(payload(flag("a", version, 20_000)), None)
            await asyncio.sleep(MS)
            inodes |= {entry.stat().st_ino for entry in tmp_path.glob("*.snapshot")}
            if len(inodes) == 3:
                break
    assert time.monotonic() - begin >= 0.35


async def test_a_change_after_a_renewal_respects_the_write_rate(tmp_path):
    """The time alone is written soon; a change that comes meanwhile is delayed."""
    mirror = snapshot(
        tmp_path, timings=SnapshotTimings(gather=0.05, bytes_per_second=1000, finish=5)
    )
    data = payload(flag("a", 1, 20_000))
    async with running(mirror):
        mirror.update(data, None)
        await mirror.flushed()
        mirror.update(data, None)
        await asyncio.sleep(5 * MS)
        mirror.update(payload(flag("a", 2, 20_000)), None)
        await asyncio.sleep(0.1)
        assert (await load(tmp_path)).payload.get(Kind.FLAG, "a").version == 1
    assert (await load(tmp_path)).payload.get(Kind.FLAG, "a").version == 2


async def test_the_last_state_is_written_at_the_end(tmp_path):
    """Even if the write was not due yet, and upstream has been lost since."""
    mirror = snapshot(tmp_path, timings=AT_THE_END)
    async with running(mirror):
        mirror.update(payload(), None)
        await asyncio.sleep(MS)
        mirror.suspend()
    assert await load(tmp_path)


async def test_a_hung_disk_does_not_keep_the_process_from_ending(tmp_path, caplog):
    """The last write has a time limit; a failure is logged."""
    mirror = snapshot(tmp_path, timings=SnapshotTimings(gather=3600, finish=20 * MS))
    free = threading.Event()
    mirror._file.store = lambda *_: free.wait(10)
    begin = time.monotonic()
    async with running(mirror):
        mirror.update(payload(), None)
        await asyncio.sleep(MS)
    assert time.monotonic() - begin < 5
    assert "could not be written within" in caplog.text
    free.set()


async def test_the_time_is_renewed_in_place(tmp_path):
    """A confirmation of the same data does not replace the file."""
    mirror, data = snapshot(tmp_path), payload(flag("a", 1, 10_000))
    async with running(mirror):
        mirror.update(data, None)
        await mirror.flushed()
        (path,) = tmp_path.iterdir()
        inode, first = path.stat().st_ino, path.read_bytes()[:HEADER_SIZE]
        await asyncio.sleep(2 * MS)
        mirror.update(data, None)
        await mirror.flushed()
        assert path.stat().st_ino == inode
        stored = await load(tmp_path)
        renewed = path.read_bytes()[:HEADER_SIZE]
        assert snapshot_format.header(renewed).confirmed > snapshot_format.header(first).confirmed
        assert set(stored.payload) == set(data)


@pytest.mark.parametrize("action", ["remove", "replace"])
async def test_a_file_changed_by_others_is_rewritten(tmp_path, action):
    """Before the time is updated, the header is compared."""
    mirror, data = snapshot(tmp_path), payload(flag("a", 5))
    async with running(mirror):
        mirror.update(data, None)
        await mirror.flushed()
        if action == "remove":
            next(tmp_path.iterdir()).unlink()
        else:
            await save(tmp_path, payload(flag("a", 4)))
        mirror.update(data, None)
        await mirror.flushed()
    assert set((await load(tmp_path)).payload) == set(data)


@contextlib.contextmanager
def no_space():
    """Limit the file size; the error is EFBIG, unlike that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_SIZE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_logged_once_at_its_begin_and_end(tmp_path, caplog):
    """The old snapshot stays, and no unfinished file is left."""
    caplog.set_level(logging.INFO)
    await save(tmp_path, payload(flag("a", 1)))
    mirror = snapshot(tmp_path)
    async with running(mirror):
        with no_space():
            for _ in range(5):
                mirror.update(payload(flag("a", 2, 5000)), None)
                await until(lambda: caplog.records)
                await asyncio.sleep(8 * MS)
            # Another attempt may be under way at any moment.
            await until(lambda: [entry.suffix for entry in tmp_path.iterdir()] == [".snapshot"])
            assert (await load(tmp_path)).payload.get(Kind.FLAG, "a").version == 1
        await mirror.flushed()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert os.strerror(errno.EFBIG) in caplog.text
    assert "is written again" in caplog.text
    assert (await load(tmp_path)).payload.get(Kind.FLAG, "a").version == 2


@pytest.mark.parametrize("obstacle", ["file as directory", "directory as file"])
async def test_an_unwritable_path_is_logged_once(tmp_path, caplog, obstacle):
    """Its recovery is logged once, too, without a restart."""
    caplog.set_level(logging.INFO)
    directory = tmp_path / "snapshots"
    in_the_way = directory
    if obstacle == "file as directory":
        directory.touch()
    else:
        in_the_way = await save(directory, payload())
        in_the_way.unlink()
        in_the_way.mkdir()
    mirror = snapshot(directory)
    assert await mirror.load() is None
    async with running(mirror):
        mirror.update(payload(), None)
        await asyncio.sleep(20 * MS)
        assert len(caplog.records) == 1
        assert "trying again" in caplog.text
        in_the_way.unlink() if in_the_way.is_file() else in_the_way.rmdir()
        await mirror.flushed()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert await load(directory)


@contextlib.contextmanager
def unprivileged():
    """Drop root's privileges for a while, because root may write everywhere."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


async def test_missing_permissions_are_logged_once(tmp_path, caplog):
    """A directory of another user does no harm."""
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o500)
    mirror = snapshot(directory)
    with unprivileged():
        await mirror.load()
        async with running(mirror):
            mirror.update(payload(), None)
            await asyncio.sleep(20 * MS)
    assert caplog.text.count(os.strerror(errno.EACCES)) == len(caplog.records) == 1


async def test_files_of_killed_processes_are_removed(tmp_path):
    """Files that another relay is writing, or of other environments, stay."""
    path = await save(tmp_path, payload())
    dead, alive = (path.with_suffix(f".{name}.tmp") for name in ("dead", "alive"))
    other = tmp_path / "environment-0000.dead.tmp"
    for file in (dead, alive, other):
        file.touch()
    with alive.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert await load(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, alive.name, other.name}


async def test_the_repr_states_path_and_progress(tmp_path):
    """The file's name is a hash, so the key is not shown."""
    mirror = snapshot(tmp_path)
    path = mirror._file.path
    assert repr(mirror) == f"<SnapshotMirror {path} flushed>"
    mirror.update(payload(), None)
    assert repr(mirror) == f"<SnapshotMirror {path} pending>"


async def test_it_does_not_appear_in_status(tmp_path):
    """`dataStoreStatus` shows databases only."""
    assert snapshot(tmp_path).status is None


WRITER = """
import asyncio, logging, sys
from pathlib import Path
from relay.model.credential import SDKKey
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores.snapshot import SnapshotMirror, SnapshotTimings

async def main():
    directory, begin = Path(sys.argv[1]), int(sys.argv[2])
    timings = SnapshotTimings(gather=0, bytes_per_second=1e12)
    key = SDKKey("sdk-5ca1ab1e-0001")
    mirror = SnapshotMirror(directory, key, logging.getLogger(), timings)
    task = asyncio.create_task(mirror.run())
    for version in range(begin, begin + 10**6):
        json = b'{"version":%d,"x":"%s"}' % (version, b"x" * 4000)
        data = Payload.of(Item(Kind.FLAG, f"f{n}", version, json) for n in range(500))
        for _ in range(2):
            mirror.update(data, None)
            await mirror.flushed()
        print(version, flush=True)

asyncio.run(main())
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path, caplog):
    """A real process that writes all the time is killed again and again."""
    chance = random.Random(1)
    version = 1
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(version)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            written = int(writer.stdout.readline())
            time.sleep(chance.uniform(0, 0.05))
            writer.kill()
            written = max([written, *map(int, writer.stdout.read().split())])
        stored = asyncio.run(load(tmp_path))
        assert len(stored.payload) == 500
        assert len({item.version for item in stored.payload}) == 1
        version = next(iter(stored.payload)).version
        assert version in {written, written + 1}
        assert [entry.suffix for entry in tmp_path.iterdir()] == [".snapshot"]
    assert caplog.text == ""


async def test_a_large_environment_does_not_hold_up_the_event_loop(tmp_path):
    """20 MB are written and read while the event loop keeps running."""
    data = Payload.of(flag(f"f{n}", 1, 2000) for n in range(10_000))
    worst, stop = 0.0, False

    async def tick():
        nonlocal worst
        while not stop:
            begin = time.perf_counter()
            await asyncio.sleep(MS)
            worst = max(worst, time.perf_counter() - begin)

    ticking = asyncio.create_task(tick())
    path = await save(tmp_path, data)
    stored = await load(tmp_path)
    stop = True
    await ticking
    assert path.stat().st_size > 20_000_000
    assert len(stored.payload) == len(data)
    assert worst < 0.25


async def test_each_payload_filter_has_a_file_of_its_own(tmp_path):
    """A file is used for its filter only, however long the key of the filter is."""
    for key in ("", "north", "x" * 500):
        await save(tmp_path, payload(flag(f"of {key}"[:20], 1)), payload_filter=key)
    assert len(list(tmp_path.glob("*.snapshot"))) == 3
    for key in ("", "north", "x" * 500):
        stored = await load(tmp_path, payload_filter=key)
        assert [item.key for item in stored.payload] == [f"of {key}"[:20]]
    assert await load(tmp_path, payload_filter="south") is None
    north, south = (snapshot(tmp_path, payload_filter=key) for key in ("north", "south"))
    north._file.path.rename(south._file.path)
    assert await south.load() is None
