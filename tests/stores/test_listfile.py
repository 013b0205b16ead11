"""The list of environments in a file: encrypted, bound to its key, and replaced at once."""

from __future__ import annotations

import asyncio
import fcntl
import stat

import pytest

from relay.errors import InvalidData, StoreUnavailable
from relay.model.credential import AutoConfigKey
from relay.protocol.autoconfig import FilterDescription
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.listfile import ListFile
from tests.support.environments import description

KEY = AutoConfigKey("rel-5ca1ab1e-0001")
LIST = EnvironmentList(
    {"id-alpha": describe(description())}, {"f": FilterDescription(1, "proj", "north")}, 5.0
)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_the_list_survives_and_says_nothing(tmp_path):
    """Nobody but the relay may read the file, and it tells neither names nor keys."""
    folder = tmp_path / "snapshots"
    file = ListFile(folder, KEY)
    assert await file.load() is None
    await file.save(LIST)
    assert await ListFile(folder, KEY).load() == LIST
    [name] = files(folder)
    assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    content = (folder / name).read_bytes()
    assert content.startswith(b"relay-environments 1\n")
    for word in (b"alpha", b"north", b"proj", b"rel-", b"5ca1ab1e"):
        assert word not in content + name.encode()


async def test_another_key_has_another_file(tmp_path):
    """Even in its place the file opens for nobody else."""
    ours, theirs = (ListFile(tmp_path, AutoConfigKey(key)) for key in ("rel-1", "rel-2"))
    await ours.save(LIST)
    assert await theirs.load() is None
    ours.path.rename(theirs.path)
    with pytest.raises(InvalidData, match="another key, or has been altered"):
        await theirs.load()
    await theirs.save(LIST)
    assert await theirs.load() == LIST


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: content.replace(b" 1\n", b" 2\n"),
        lambda content: b"\0" * len(content),
    ],
)
async def test_a_spoilt_file_is_not_used(tmp_path, spoil):
    """Whatever has happened to it; the next write replaces it."""
    file = ListFile(tmp_path, KEY)
    await file.save(LIST)
    file.path.write_bytes(spoil(file.path.read_bytes()))
    with pytest.raises(InvalidData):
        await file.load()
    await file.save(LIST)
    assert await file.load() == LIST


async def test_what_killed_processes_have_left_is_removed(tmp_path):
    """But not what a living one is writing, nor what belongs to others."""
    file = ListFile(tmp_path, KEY)
    dead, alive = (file.path.with_suffix(f".{name}.tmp") for name in ("dead", "alive"))
    other = tmp_path / "environments-0000.dead.tmp"
    for path in (dead, alive, other):
        path.write_text("half")
    with alive.open() as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        assert await file.load() is None
    assert files(tmp_path) == sorted([alive.name, other.name])


async def test_a_path_that_cannot_be_used_is_an_outage(tmp_path):
    """Reading and writing say why."""
    (tmp_path / "file").touch()
    file = ListFile(tmp_path / "file", KEY)
    with pytest.raises(StoreUnavailable, match="Not a directory"):
        await file.load()
    with pytest.raises(StoreUnavailable, match="File exists"):
        await file.save(LIST)


async def test_two_writers_at_once_leave_a_whole_file(tmp_path):
    """Relays that share a folder, and one that ends while it writes."""
    one, two = ListFile(tmp_path, KEY), ListFile(tmp_path, KEY)
    await asyncio.gather(*(each.save(LIST) for each in (one, two) * 5))
    assert await one.load() == LIST
    assert len(files(tmp_path)) == 1
