"""Work in steps."""

from __future__ import annotations

import itertools

import pytest

from relay.steps import Steps, Work, finish


def adding(numbers: list[int]) -> Steps[int]:
    total = 0
    for number in numbers:
        total += number
        yield
    return total


@pytest.mark.parametrize("numbers", [[], [1], [1, 2, 3]])
def test_all_steps_can_be_done_without_a_pause(numbers):
    """Even if there are none."""
    assert finish(adding(numbers)) == sum(numbers)


def test_a_pause_comes_after_the_step_that_takes_too_long():
    """The work goes on from there."""
    seconds = itertools.count()
    work = Work(adding([1, 2, 3, 4, 5]))
    assert work.run(1, lambda: next(seconds)) is False
    assert next(seconds) == 3
    assert work.run(100, lambda: next(seconds)) is True
    assert next(seconds) == 6
    assert work.result == 15


def test_a_step_that_fails_ends_the_work():
    """Its error is raised where the step was done."""

    def failing() -> Steps[None]:
        yield
        raise ValueError("broken")

    work = Work(failing())
    assert work.run(0, lambda: 1) is False
    with pytest.raises(ValueError, match="broken"):
        work.run()
