"""Forgets environments that are gone: their counts, masked keys and names."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence

from relay.relay import Relay
from relay.telemetry.log import forget_environment, masked_keys, unmask_keys

INTERVAL = 120.0
"""Seconds between two rounds. Names and keys are kept for one at least, so that metrics are read
and the use of the last minute is reported once more."""


class Housekeeping:
    """Frees what was kept for removed environments, former names and revoked keys.

    Args:
        relay: provides the environments; events that wait keep the name of theirs.
        keepers: forget the counts and state that they keep under a name.
        interval: seconds between two rounds.
    """

    def __init__(
        self,
        relay: Relay,
        keepers: Sequence[Callable[[str], None]],
        interval: float = INTERVAL,
    ) -> None:
        self._relay = relay
        self._keepers = keepers
        self._interval = interval
        self._seen: frozenset[str] = frozenset()
        """Former names at the last round."""
        self._unused_keys: frozenset[str] = frozenset()
        """Keys that opened nothing at the last round."""

    async def run(self) -> None:
        """Forget what is due, in rounds, until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            self.tidy()

    def tidy(self) -> None:
        """Forget the names that were former ones already at the last round, and their keys."""
        registry, events = self._relay.registry, self._relay.events
        former = frozenset(registry.former_names)
        due = former & self._seen
        if due:
            gc.unfreeze()  # environments of the start are exempt from garbage collection
        for name in due:
            if events is None or events.forget(name):
                registry.forget(name)
                forget_environment(name)
                for forget in self._keepers:
                    forget(name)
        self._seen = former
        unused = masked_keys() - registry.keys
        unmask_keys(unused & self._unused_keys)
        self._unused_keys = unused
