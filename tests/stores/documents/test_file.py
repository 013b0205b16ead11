"""Documents in a folder: whole at any moment, and harmless when the disk fails."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relay.errors import StoreUnavailable
from relay.model.payload import Payload
from relay.protocol import document
from relay.steps import finish
from relay.stores.documents import file
from tests.stores.contract import flag
from tests.stores.documents.conftest import NAME

ROOT = Path(__file__).parent.parent.parent.parent


def payload(version: int, size: int = 200) -> Payload:
    return Payload.of(flag(f"flag-{n}", version) for n in range(size))


@contextlib.contextmanager
def no_space():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_reader_never_sees_a_part(tmp_path, open_store):
    """However often the document is replaced meanwhile."""
    store = open_store(f"file://{tmp_path}")
    await store.init(payload(0))
    ended, seen = threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            flags = json.loads((tmp_path / NAME).read_bytes())["flags"]
            versions = {each["version"] for each in flags.values()}
            assert len(flags) == 200
            assert len(versions) == 1
            seen.update(versions)

    reading = asyncio.create_task(asyncio.to_thread(read))
    for version in range(1, 40):
        await store.upsert(list(payload(version)))
    ended.set()
    await reading
    assert len(seen) > 2


async def test_a_full_disk_leaves_the_old_document(tmp_path, open_store):
    """And nothing else."""
    store = open_store(f"file://{tmp_path}")
    await store.init(payload(1))
    with no_space(), pytest.raises(StoreUnavailable, match=os.strerror(27)):
        await store.init(payload(2))
    assert {each.name for each in tmp_path.iterdir()} == {NAME, f"{NAME}.gz"}
    assert (tmp_path / NAME).read_bytes() == document.text(payload(1))
    assert await store.upsert(list(payload(3)))
    assert (tmp_path / NAME).read_bytes() == document.text(payload(3))


@pytest.mark.parametrize("folder", ["file/flags", "file"])
async def test_an_impossible_folder_has_a_reason(tmp_path, open_store, folder):
    (tmp_path / "file").touch()
    store = open_store(f"file://{tmp_path}/{folder}")
    with pytest.raises(StoreUnavailable, match="Not a directory"):
        await store.init(payload(1))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
async def test_a_read_only_folder_has_a_reason(open_store):
    store = open_store("file:///proc/self")
    with pytest.raises(StoreUnavailable, match=r"No such file|not permitted|denied|Read-only"):
        await store.init(payload(1))


async def test_the_umask_decides_who_may_read(tmp_path, open_store):
    """Documents are made for others, unlike the relay's own files."""
    before = os.umask(0o027)
    try:
        await open_store(f"file://{tmp_path}").init(payload(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o640


async def test_what_a_killed_relay_left_unfinished_is_removed(tmp_path, open_store):
    """By the next write, of this document only."""
    leftover, other = tmp_path / f"{NAME}.0123.tmp", tmp_path / "LD-Env-other.0123.tmp"
    leftover.touch()
    other.touch()
    await open_store(f"file://{tmp_path}").init(payload(1))
    assert not leftover.exists()
    assert other.exists()


async def test_a_writer_waits_for_another(tmp_path, open_store, monkeypatch):
    """But not for ever."""
    monkeypatch.setattr(file, "MAX_WAIT", 0.2)
    store = open_store(f"file://{tmp_path}")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreUnavailable, match="another process writes there"):
        await store.init(payload(1))
    monkeypatch.setattr(file, "MAX_WAIT", 10)
    writing = asyncio.create_task(store.init(payload(1)))
    await asyncio.sleep(0.05)
    os.close(descriptor)
    await writing
    assert (tmp_path / NAME).exists()


WRITER = """
import asyncio, sys
from relay.model.credential import EnvironmentID, SDKKey, Secret
from relay.model.environment import EnvironmentSpec
from relay.stores.documents.connect import Places
from relay.telemetry.log import environment_log
from tests.stores.contract import flag

async def main():
    spec = EnvironmentSpec("main", SDKKey("sdk-1"), environment_id=EnvironmentID("env-1"))
    log = environment_log("main", "...")
    [store] = Places(lambda: None).stores([sys.argv[1]], Secret(""), spec, log)
    stored = await store.load()
    first = stored.payload.newest + 1
    print("ready", flush=True)
    for version in range(first, first + 100_000):
        await store.upsert([flag(f"flag-{n}", version) for n in range(200)])

asyncio.run(main())
"""


async def test_a_kill_at_any_moment_leaves_complete_documents(tmp_path, open_store):
    """Both forms can be read, and the next relay makes them equal."""
    await open_store(f"file://{tmp_path}").init(payload(1))
    newest = 1
    for turn in range(6):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, f"file://{tmp_path}", cwd=ROOT, stdout=subprocess.PIPE
        )
        assert await process.stdout.readline() == b"ready\n"
        await asyncio.sleep(0.03 + 0.011 * turn)
        process.kill()
        await process.wait()
        for name in (NAME, f"{NAME}.gz"):
            items = finish(document.read((tmp_path / name).read_bytes())).items
            assert len({item.version for item in items}) == 1
        store = open_store(f"file://{tmp_path}")
        stored = (await store.load()).payload
        assert stored.newest > newest
        newest = stored.newest + 1
        await store.upsert(list(payload(newest)))
        text = (tmp_path / NAME).read_bytes()
        assert document.decompressed((tmp_path / f"{NAME}.gz").read_bytes()) == text
    assert not list(tmp_path.glob("*.tmp"))
