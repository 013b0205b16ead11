"""The file source, with files that appear, change and break."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing

import pytest

from relay.errors import ErrorKind
from relay.model.item import LAST_VERSION_OF_TIME
from relay.model.payload import ChangeSet
from relay.sources import Interrupted
from relay.sources.file import FileSource
from relay.sources.timings import SourceTimings

FAST = SourceTimings(confirm_every=1000, file_interval=0.01)


@pytest.fixture(name="path")
def flags_file(tmp_path):
    return tmp_path / "flags.yaml"


async def test_a_file_may_come_later_and_be_replaced(path):
    """A missing file is reported once; renaming another file over it is a change."""
    async with asyncio.timeout(20), aclosing(FileSource(path, FAST).updates()) as updates:
        missing = await anext(updates)
        assert isinstance(missing, Interrupted)
        assert str(path) in missing.reason
        path.write_text("flagValues: {a: 1}")
        assert isinstance(first := await anext(updates), ChangeSet)
        assert first.items[0].version == int(path.stat().st_mtime)
        other = path.with_name("new")
        other.write_text("flagValues: {a: 2}")
        other.replace(path)
        assert (await anext(updates)).items[0].version > first.items[0].version


async def test_a_wrong_clock_gives_versions_that_sdks_can_hold(path):
    """In 32 bits, with room for the next ones."""
    for seconds, version in ((-5, 0), (2**40, LAST_VERSION_OF_TIME)):
        path.write_text("flagValues: {a: 1}")
        os.utime(path, (0, seconds))
        async with asyncio.timeout(20), aclosing(FileSource(path, FAST).updates()) as updates:
            assert (await anext(updates)).items[0].version == version
            path.write_text("flagValues: {a: 2}")
            assert version < (await anext(updates)).items[0].version < 2**31


async def test_the_repr_states_path_and_size(path):
    path.write_text("flagValues: {a: 1}")
    source = FileSource(path, FAST)
    async with asyncio.timeout(20), aclosing(source.updates()) as updates:
        await anext(updates)
    assert repr(source) == f"<FileSource {path} 1 items>"


async def test_a_half_written_file_is_reported_once(path):
    """With file and reason; the next good state is taken."""
    path.write_text("flags: {a: [")
    async with asyncio.timeout(20), aclosing(FileSource(path, FAST).updates()) as updates:
        broken = await anext(updates)
        assert broken.kind is ErrorKind.INVALID_DATA
        assert str(path) in broken.reason
        waiting = asyncio.ensure_future(anext(updates))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        path.write_text("flagValues: {a: 1}")
        assert (await waiting).full
