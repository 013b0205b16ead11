"""Files that the relay writes are as private as the directory they are in."""

from __future__ import annotations

import os
import stat

import pytest

from relay.files import (
    make_directory,
    open_private,
    remove_unfinished,
    replacing,
    write_private,
)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True, params=[0o022, 0o077, 0o000])
def mask(request):
    """Of the process; it must not matter."""
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("above", [0o700, 0o755, 0o777, 0o775, 0o750, 0o1777])
def test_files_are_the_relays_alone(tmp_path, above):
    """Wherever others may look, too."""
    tmp_path.chmod(above)
    file = tmp_path / "a" / "b" / "file"
    make_directory(file.parent)
    os.close(open_private(file, os.O_RDWR | os.O_CREAT))
    assert [mode(file), mode(file.parent), mode(file.parent.parent)] == [0o600, 0o700, 0o700]
    assert mode(tmp_path) == above


@pytest.mark.parametrize("above", [0o770, 0o2770])
def test_files_are_the_groups_where_the_directory_is(tmp_path, above):
    """And nobody else's; directories below share it, and pass on whose it is."""
    tmp_path.chmod(above)
    file = tmp_path / "a" / "b" / "file"
    make_directory(file.parent)
    os.close(open_private(file, os.O_RDWR | os.O_CREAT))
    assert [mode(file), mode(file.parent), mode(file.parent.parent)] == [0o660, above, above]


def test_what_exists_stays_as_it_is(tmp_path):
    """The operator may have had reasons."""
    tmp_path.chmod(0o770)
    folder, file = tmp_path / "a", tmp_path / "a" / "file"
    folder.mkdir()
    folder.chmod(0o700)
    file.touch()
    file.chmod(0o640)
    make_directory(folder)
    os.close(open_private(file, os.O_RDWR | os.O_CREAT))
    assert [mode(file), mode(folder)] == [0o640, 0o700]


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path):
    """Also of one above."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            make_directory(path)


def test_a_private_file_is_replaced_at_once(tmp_path):
    """A reader who has it open keeps the former content, and nothing else is left behind."""
    path = tmp_path / "file"
    write_private(path, b"one")
    with path.open("rb") as reader:
        write_private(path, b"two")
        assert reader.read() == b"one"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    """And nothing else."""
    path = tmp_path / "file"
    write_private(path, b"one")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("not bytes")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_have_left_is_removed(tmp_path):
    """But not what a living one writes, nor what becomes another file."""
    path = tmp_path / "a[b].file"
    dead, other = tmp_path / "a[b].dead.tmp", tmp_path / "ab.dead.tmp"
    for each in (dead, other):
        each.touch()
    with replacing(path) as file:
        file.write(b"one")
        remove_unfinished(path)
        assert len(list(tmp_path.iterdir())) == 2
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    remove_unfinished(tmp_path / "no folder" / "file")
