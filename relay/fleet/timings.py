"""Times of a fleet, of the monotonic clock; no member's clock is compared with another's."""

from __future__ import annotations

from dataclasses import dataclass

from relay.backoff import Backoff


@dataclass(frozen=True, slots=True)
class FleetTimings:
    """Delays and limits in seconds. Together, the next change arrives within 5 s of a loss.

    Args:
        ttl: for which a lease is given.
        renew: from one renewal of it to the next.
        margin: share of `ttl` by which a leader stops early, for clocks that run differently.
        poll: between two looks at leases and heads.
        wait: for entries of a feed that is one environment's: longer, as there are many of them.
        jitter: upper bound of a candidate's delay, so that not all acquire at once.
        answer: for a small command.
        lost: without an answer of Redis, until members are on their own.
        settle: during which Redis must answer before members rely on it again.
        spread: upper bound of the delay until a member alone connects upstream.
        doubt: between two complete answers of upstream, before items are taken back.
        patience: for the feed to reach what a member has, before older data are adopted: longer
            than the doubts of two leaders, one after the other.
        unhealthy: during which a leader may be without upstream, before it resigns.
        abstain: for which it is no candidate then.
        unwanted: after which it leads all the same if nobody else wants to.
        confirm: between two entries that say that nothing has changed.
        compare: between two comparisons of the data in Redis with their address.
        probe: between two cheap looks whether the data are there at all.
        retry: after failed publications.
        finish: for the last publication and the release, when the relay ends.
    """

    ttl: float = 3.0
    renew: float = 1.0
    margin: float = 0.1
    poll: float = 0.5
    wait: float = 2.0
    jitter: float = 0.2
    answer: float = 0.6
    lost: float = 2.0
    settle: float = 1.0
    spread: float = 0.5
    doubt: float = 15.0
    patience: float = 40.0
    unhealthy: float = 10.0
    abstain: Backoff = Backoff(first=30.0, longest=600.0)
    unwanted: float = 2.0
    confirm: float = 60.0
    compare: float = 60.0
    probe: float = 10.0
    retry: Backoff = Backoff(first=0.1, longest=2.0)
    finish: float = 1.0

    @property
    def lease(self) -> float:
        """Seconds from sending the command for which a leader relies on a lease."""
        return self.ttl * (1 - self.margin)
