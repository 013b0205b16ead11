"""Random numbers and IDs, from one place, so that tests and simulations can repeat them.

They are no secrets: use the module `secrets` for those.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_random = random.Random()  # noqa: S311 - see above
os.register_at_fork(after_in_child=_random.seed)  # two processes must not make the same IDs


def seed(value: int | None = None) -> None:
    """Make all that follows repeatable, or unpredictable again."""
    _random.seed(value)


def fraction() -> float:
    """Return a number in [0, 1)."""
    return _random.random()


def choice(options: Sequence[T]) -> T:
    """Return one of the options, each as likely as the others."""
    return _random.choice(options)


def new_id() -> str:
    """Return a new UUID, version 4."""
    from uuid import UUID  # noqa: PLC0415 - slow to import, and not every process needs one

    return str(UUID(int=_random.getrandbits(128), version=4))
