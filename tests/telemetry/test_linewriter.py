"""Lines are written in order, by a thread that never holds up whoever logs."""

import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from relay.telemetry import linewriter
from relay.telemetry.linewriter import LineWriter


class Pipe:
    """Pipe in place of an output of the process."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def read(self) -> list[str]:
        """Return all lines that have been written."""
        os.close(self.writing)
        with os.fdopen(self.reading) as lines:
            return lines.read().splitlines()

    def close(self) -> None:
        for descriptor in (self.reading, self.writing):
            with suppress(OSError):
                os.close(descriptor)


@pytest.fixture(name="pipe")
def make_pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_all_lines_are_written_in_order(pipe: Pipe) -> None:
    """Also the last ones before the end, and more than are written at once."""
    writer = LineWriter()
    lines = [str(number) for number in range(3 * linewriter.WRITE_LINES + 1)]
    for line in lines:
        writer.put(pipe.writing, f"{line}\n".encode())
    writer.close()
    assert writer.lost == 0
    assert pipe.read() == lines


def test_a_lone_line_is_written_at_once(pipe: Pipe) -> None:
    """Nothing needs to follow it."""
    writer = LineWriter()
    for _ in range(3):
        writer.put(pipe.writing, b"one\n")
        assert os.read(pipe.reading, 100) == b"one\n"
    writer.close()


def test_lines_in_quick_succession_share_a_wake_up(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they do not take the interpreter from the event loop line by line."""
    monkeypatch.setattr(linewriter, "PAUSE", 60)
    writer = LineWriter()
    writer.put(pipe.writing, b"at once\n")
    while select.select([pipe.reading], [], [], 0.1)[0]:  # until it pauses
        os.read(pipe.reading, 1000)
        writer.put(pipe.writing, b"later\n")
    for _ in range(99):
        writer.put(pipe.writing, b"later\n")
    assert repr(writer) == "<LineWriter: 100 lines queued, 0 lost>"
    writer.close()  # this ends the pause
    assert pipe.read() == ["later"] * 100


def test_two_outputs_keep_their_lines(pipe: Pipe) -> None:
    """Each gets its own, and they are written in the order in which they came."""
    other = Pipe()
    writer = LineWriter()
    for number in range(6):
        target = other if number % 3 == 2 else pipe
        writer.put(target.writing, f"{number}\n".encode())
    writer.close()
    assert pipe.read() == ["0", "1", "3", "4"]
    assert other.read() == ["2", "5"]


def test_a_broken_pipe_costs_lines_and_nothing_else(pipe: Pipe) -> None:
    """They are counted; other outputs go on."""
    other = Pipe()
    os.close(pipe.reading)
    writer = LineWriter()
    for _ in range(3):
        writer.put(pipe.writing, b"lost\n")
        writer.put(other.writing, b"written\n")
    writer.close()
    assert writer.lost == 3
    assert other.read() == ["written"] * 3


def test_only_what_is_missing_counts_as_lost(pipe: Pipe) -> None:
    """A full pipe takes some of the lines that are written at once."""
    os.set_blocking(pipe.writing, False)  # stands for a disk that fills up
    writer = LineWriter()
    for _ in range(100):
        writer.put(pipe.writing, b"x" * 9_999 + b"\n")
    writer.close()
    assert 0 < writer.lost < 100
    written = [line for line in pipe.read() if len(line) == 9_999]
    assert len(written) == 100 - writer.lost


def test_a_reader_that_stalls_does_not_stop_the_writer(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nobody reads the output, lines are dropped and counted at once, and the end comes."""
    monkeypatch.setattr(linewriter, "CLOSE_LIMIT", 0.05)
    before = threading.active_count()
    writer = LineWriter()
    begin = time.monotonic()
    for _ in range(linewriter.WAITING_LINES + 5000):
        writer.put(pipe.writing, b"x" * 100 + b"\n")
    lost = writer.lost
    assert lost > 0
    writer.close()
    assert time.monotonic() - begin < 10
    assert writer.lost > lost  # those that still wait
    pipe.read()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before
