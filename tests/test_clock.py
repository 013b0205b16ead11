"""The program's clocks."""

from __future__ import annotations

import ast
import asyncio
import time
from pathlib import Path

from relay import clock
from tests.support import virtual


def test_without_replacement_the_clocks_are_the_systems():
    """`now` is Unix time, too, as long as nobody corrects the system's clock."""
    before = time.monotonic(), time.time()
    read = clock.monotonic(), clock.unix()
    after = time.monotonic(), time.time()
    assert before <= read <= after
    assert abs(clock.now() - time.time()) < 60


def test_now_ignores_corrections_of_the_system_clock():
    """It counts on from the time at which it was started."""
    seconds, corrected = 100.0, 5000.0
    clock.use(lambda: seconds, lambda: corrected)
    try:
        assert (clock.now(), clock.unix()) == (5000, 5000)
        seconds, corrected = 107.0, 9999.0
        assert (clock.now(), clock.unix()) == (5007, 9999)
    finally:
        clock.use()
    assert clock.monotonic() <= time.monotonic()


def test_virtual_time_passes_at_once_on_all_clocks():
    """A day of sleep takes no time, and the clocks are the system's again afterwards."""

    async def sleep_a_day() -> list[float]:
        begun = clock.monotonic(), clock.unix(), clock.now()
        await asyncio.sleep(86400)
        ended = clock.monotonic(), clock.unix(), clock.now()
        return [end - begin for begin, end in zip(begun, ended, strict=True)]

    began = time.monotonic()
    assert virtual.run(sleep_a_day()) == [86400] * 3
    assert time.monotonic() - began < 3600
    assert clock.unix() != virtual.START
    assert clock.monotonic() >= began


def test_nothing_reads_the_time_of_the_event_loop():
    """`clock.monotonic` is the same time; imports of other clocks are forbidden in pyproject.toml."""
    readers = [
        f"{path}:{node.lineno}"
        for path in sorted(Path(clock.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "time"
    ]
    assert [reader.rpartition("/")[2].partition(":")[0] for reader in readers] == [
        "clock.py",  # the system's
        "clock.py",
        "process.py",  # beside the kernel's time since it was booted
    ]
