"""Checks of upstream after change notices, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay import clock
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.protocol.webhook import ChangedResource
from relay.refresh import MAX_EXPECTED, RefreshTracker
from tests.stores.contract import flag
from tests.support import virtual

Step = tuple[float, Callable[["Environment", RefreshTracker], object]]


class Environment:
    """Records the checks, and gets its changes from the test."""

    def __init__(self) -> None:
        self.payload: Payload | None = EMPTY
        self.changes = 0
        self.checks: list[tuple[float, bool]] = []

    def check(self, *, reconnect: bool = False) -> None:
        self.checks.append((round(clock.monotonic(), 1), reconnect))

    def receive(self, version: int, key: str = "lamp") -> None:
        self.changes += 1
        self.payload, _ = (self.payload or EMPTY).apply(ChangeSet((flag(key, version),)))


def announced(version: int | None, key: str = "lamp") -> ChangedResource:
    return ChangedResource("shop", "production", key, version)


def told(*resources: ChangedResource) -> Callable[[Environment, RefreshTracker], bool]:
    return lambda _, tracker: tracker.announce(resources)


def received(version: int) -> Callable[[Environment, RefreshTracker], None]:
    return lambda environment, _: environment.receive(version)


def checks_of(*steps: Step) -> list[tuple[float, bool]]:
    """Carry out steps at their times; return the times of all checks, and whether they reconnect."""
    environment = Environment()

    async def live() -> None:
        tracker = RefreshTracker(environment)

        async def track() -> None:
            while True:
                await tracker.run()
                await asyncio.sleep(0.01)

        running = asyncio.create_task(track())
        for at, step in steps:
            await asyncio.sleep(at - clock.monotonic())
            step(environment, tracker)
        await asyncio.sleep(60)
        running.cancel()
        await asyncio.wait([running])

    virtual.run(live())
    return environment.checks


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # What is announced is looked for at once, and after 2, 5 and 15 seconds.
        ([(10, told(announced(2)))], [(10, False), (12, False), (15, False), (25, True)]),
        ([(10, told(announced(2))), (10.5, received(2))], [(10, False)]),
        ([(10, told(announced(2))), (13, received(2))], [(10, False), (12, False)]),
        ([(10, told(announced(2))), (13, received(3))], [(10, False), (12, False)]),
        # An earlier version is not the one that was announced.
        (
            [(10, told(announced(3))), (11, received(2)), (13, received(3))],
            [(10, False), (12, False)],
        ),
        # Without a version any change will do, and no healthy stream is replaced.
        ([(10, told())], [(10, False), (12, False), (15, False), (25, False)]),
        ([(10, told(announced(None))), (13, received(1))], [(10, False), (12, False)]),
        # What is there already needs no check.
        ([(5, received(2)), (10, told(announced(2)))], []),
        # A second notice begins anew, but not at once if the last check was just now.
        (
            [(10, told(announced(2))), (10.1, told(announced(3))), (11, received(3))],
            [(10, False), (10.2, False)],
        ),
        (
            [(10, told(announced(2))), (14, told(announced(3))), (14.5, received(3))],
            [(10, False), (12, False), (14, False)],
        ),
        # Another hour, another change.
        (
            [
                *((10, told(announced(2))), (10.5, received(2))),
                *((3600, told(announced(3))), (3600.5, received(3))),
            ],
            [(10, False), (3600, False)],
        ),
    ],
)
def test_upstream_is_checked_until_it_has_what_was_announced(steps, expected):
    """Its caches may lag behind; the last check replaces a stream that does not deliver."""
    assert checks_of(*steps) == expected


def test_many_notices_share_a_check():
    """However many there are within a fifth of a second."""
    notices = [(10 + n / 1000, told(announced(n + 2))) for n in range(150)]
    assert checks_of(*notices, (11, received(151))) == [(10, False), (10.2, False)]


def test_a_change_of_very_many_flags_is_remembered_as_any_change():
    """The memory of what is expected is bounded."""
    many = told(*(announced(2, f"flag-{n}") for n in range(MAX_EXPECTED + 1)))
    assert checks_of((10, many), (13, received(1))) == [(10, False), (12, False)]


def test_a_notice_says_whether_there_is_anything_to_look_for():
    """A flag that is deleted has its version, too."""
    environment = Environment()
    tracker = RefreshTracker(environment)
    environment.receive(5)
    environment.payload, _ = EMPTY.apply(ChangeSet((flag("gone", 3, None), flag("lamp", 5))))
    assert tracker.announce([announced(5), announced(3, "gone")]) is False
    assert tracker.announce([announced(6)]) is True
    assert tracker.announce([]) is True
    environment.payload = None
    assert tracker.announce([announced(1)]) is True
