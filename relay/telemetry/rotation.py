"""Log lines about keys that a new description of an environment has changed, or has not."""

from __future__ import annotations

import logging
from typing import Any

from relay import clock
from relay.model.environment import EnvironmentSpec
from relay.protocol.environments import EnvironmentDescription, ignored_expiry, rotations
from relay.telemetry.log import local_time


def log_rotation(
    log: logging.Logger,
    description: EnvironmentDescription,
    before: EnvironmentSpec | None,
    after: EnvironmentSpec,
) -> None:
    """Log each key that was replaced, added, limited or revoked; warn of an expiry that is ignored.

    Args:
        log: takes the lines.
        description: of the environment.
        before: spec before the change; None for a new environment, whose keys are no news.
        after: spec after it.
    """
    now = clock.now()
    for text, *arguments in rotations(before, after, now) if before else ():
        log.info(text, *map(_shown, arguments))
    ignored = ignored_expiry(description, before, now)
    if ignored is not None:
        text, *arguments = ignored
        log.warning(text, *map(_shown, arguments))


def _shown(argument: Any) -> Any:
    """Return an argument of a line, with times for people."""
    return local_time(argument) if isinstance(argument, float) else argument
