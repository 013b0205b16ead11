"""Counts of events by environment, and the log lines about outages and losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from relay.events.policy import SpecOf
from relay.model.event import EventsEndpoint, Partition
from relay.telemetry.log import Log, environment_log
from relay.telemetry.throttle import Throttle

REPORT_EVERY = 60.0
"""Seconds between two log lines about losses of the same kind."""


@dataclass(slots=True)
class EventCounts:
    """Numbers of payloads of one environment since the start.

    Args:
        received: accepted, duplicates included.
        duplicates: dropped because their payload id was known.
        forwarded: accepted by upstream.
        retried: requests (not payloads) that had to be repeated.
        quarantined: not well-formed, or rejected while upstream accepts others; kept for
            inspection.
        evicted: lost for want of space, or because they were too old.
        waiting: not delivered yet.
    """

    received: int = 0
    duplicates: int = 0
    forwarded: int = 0
    retried: int = 0
    quarantined: int = 0
    evicted: int = 0
    waiting: int = 0

    @property
    def totals(self) -> dict[str, int]:
        """Those that only grow, by name."""
        return {name: count for name, count in asdict(self).items() if name != "waiting"}

    def add(self, totals: Mapping[str, int]) -> None:
        """Add numbers that were counted before, by name."""
        for name, count in totals.items():
            setattr(self, name, getattr(self, name) + count)


class EventReports:
    """Counts, outages and losses of all environments.

    Args:
        spec_of: returns the current description of an environment.
    """

    def __init__(self, spec_of: SpecOf) -> None:
        self.counts: defaultdict[str, EventCounts] = defaultdict(EventCounts)
        """Counts by environment."""
        self.failing: set[tuple[str, EventsEndpoint]] = set()
        """Environments and endpoints whose last attempt failed."""
        self._spec_of = spec_of
        self._losses: defaultdict[tuple[str, str], Throttle] = defaultdict(
            lambda: Throttle(REPORT_EVERY)
        )
        """Losses to log, by fate and environment."""

    def __repr__(self) -> str:
        return f"<EventReports: {len(self.counts)} environments, {len(self.failing)} failing>"

    @property
    def failing_environments(self) -> set[str]:
        """Environments with an outage."""
        return {environment for environment, _ in self.failing}

    def is_failing(self, partition: Partition) -> bool:
        """Return whether the last attempt of a partition's environment and endpoint failed."""
        return (partition.environment, partition.endpoint) in self.failing

    def begin_outage(self, partition: Partition, reason: str) -> bool:
        """Record a failed attempt, and log the first one; return whether it is the first one."""
        if self.is_failing(partition):
            return False
        self.failing.add((partition.environment, partition.endpoint))
        text = "Events for %s cannot be delivered: %s; they are kept and tried again"
        self._log_of(partition.environment).warning(text, partition.endpoint.value, reason)
        return True

    def end_outage(self, partition: Partition) -> None:
        """Record a delivery; log the first one after an outage."""
        if self.is_failing(partition):
            self.failing.remove((partition.environment, partition.endpoint))
            text = "Events for %s are delivered again"
            self._log_of(partition.environment).info(text, partition.endpoint.value)

    def count_delivered(self, environment: str, payloads: int) -> None:
        """Count payloads that upstream has accepted."""
        counts = self.counts[environment]
        counts.forwarded += payloads
        counts.waiting -= payloads

    def count_evicted(self, environment: str, payloads: int) -> None:
        """Count payloads that were evicted; a negative number if they have arrived after all."""
        counts = self.counts[environment]
        counts.evicted += payloads
        counts.waiting -= payloads
        self._report("given up, as there is no room or they are too old", environment, payloads)

    def count_quarantined(
        self, environment: str, payloads: int, complete: int, reason: str
    ) -> None:
        """Count payloads in the quarantine.

        Args:
            environment: name of the environment.
            payloads: number of payloads, or of parts of one.
            complete: number of payloads that are complete, so that they wait no longer.
            reason: continues the sentence "they were set aside, as …".
        """
        counts = self.counts[environment]
        counts.waiting -= complete
        counts.quarantined += payloads
        self._report(f"set aside, as {reason}", environment, payloads)

    def forget(self, environment: str) -> None:
        """Forget the counts and outages of an environment that is gone; log its last losses."""
        for key in [key for key in self._losses if key[1] == environment]:
            self._log_losses(*key, self._losses.pop(key).take())
        self.counts.pop(environment, None)
        self.failing = {key for key in self.failing if key[0] != environment}

    def log_losses(self) -> None:
        """Log the losses that have not been logged."""
        for (fate, environment), throttle in self._losses.items():
            self._log_losses(fate, environment, throttle.take())

    def _report(self, fate: str, environment: str, payloads: int) -> None:
        """Count losses, and log their sum at most every `REPORT_EVERY` seconds."""
        self._log_losses(fate, environment, self._losses[fate, environment].count(payloads))

    def _log_losses(self, fate: str, environment: str, payloads: int) -> None:
        if payloads:
            self._log_of(environment).warning("%d posts of events were %s", payloads, fate)

    def _log_of(self, environment: str) -> Log:
        spec = self._spec_of(environment)
        return environment_log(environment, "" if spec is None else spec.sdk_key.masked)
