"""Decides whether a rejection is the fault of a payload or of upstream.

A misconfigured proxy, or an events service with an outage, may reject everything for a while. So a
rejected payload is quarantined only if upstream accepts others of its kind meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

STRIKES = 2
"""Strikes that convict a payload: one alone could be the first moment of an outage."""

STRIKES_IF_DELIVERED = 3
"""The same for a batch that upstream may have already: a wrong verdict delivers it twice."""

MAX_KNOWN = 10_000
"""Maximum number of rejected batches that are remembered; for a forgotten one the evidence starts
over."""


class Evidence:
    """Upstream's verdicts on the payloads of one environment and endpoint.

    Batches are named by their payload ids. A rejection is a strike against a payload if upstream
    has accepted another batch since it rejected this payload before, in a batch or alone, and has
    rejected nothing else since then. The next strike needs no further batch: without anything to
    compare with, a payload that alone is rejected again has to go some time.
    """

    def __init__(self) -> None:
        self.accepting = False
        """True if upstream accepted the last batch that it decided on."""
        self._accepted = 0
        """Number of batches that upstream has accepted."""
        self._accepted_before: dict[str, int] = {}
        """Value of `_accepted` at the last rejection of each known batch, oldest entry first."""
        self._strikes: Counter[str] = Counter()
        self._rejected: set[str] = set()
        """Batches rejected since the last accepted one; two at most are recorded."""
        self._rejected_alone: set[str] = set()
        """The same for payloads alone, and for batches that must not be split yet."""

    def __repr__(self) -> str:
        state = "accepting" if self.accepting else "outage" if self.outage else "undecided"
        return f"<Evidence: {state}, {len(self._accepted_before)} known rejections>"

    @property
    def outage(self) -> bool:
        """True if several payloads are rejected and no batch is accepted."""
        return len(self._rejected_alone) > 1

    def knows(self, batch: str) -> bool:
        """Return whether the batch was rejected before, or the batch it is a half of."""
        return batch in self._accepted_before

    def accept(self, batch: str) -> None:
        """Record that upstream has accepted a batch."""
        self.accepting = True
        self._accepted += 1
        self._rejected.clear()
        self._rejected_alone.clear()
        self.forget(batch)

    def doubt(self, batch: str) -> None:
        """Record that upstream has rejected a batch that will be retried."""
        self.accepting = False
        self._remember(batch)
        _add(self._rejected, batch)

    def split(self, batch: str, halves: Iterable[str]) -> None:
        """Record that upstream has rejected a batch, and that halves take its place."""
        self.doubt(batch)
        for half in halves:
            self._remember(half)
        self.forget(batch)

    def reject(self, payload: str, *, maybe_delivered: bool = False) -> bool:
        """Record that upstream has rejected a payload alone; return whether the payload is bad.

        Args:
            payload: id of the payload, or of a batch that must not be split yet.
            maybe_delivered: True if upstream may have it already. Then each strike needs a batch
                that was accepted since the one before.
        """
        proven = self._accepted > self._accepted_before.get(payload, self._accepted) or (
            self._strikes[payload] > 0 and not maybe_delivered
        )
        if proven and self._rejected <= {payload}:
            self._strikes[payload] += 1
        if self._strikes[payload] >= (STRIKES_IF_DELIVERED if maybe_delivered else STRIKES):
            self._rejected.discard(payload)
            self._rejected_alone.discard(payload)
            self.forget(payload)
            return True
        self.doubt(payload)
        _add(self._rejected_alone, payload)
        return False

    def forget(self, batch: str) -> None:
        """Forget a batch that is no longer waiting."""
        self._accepted_before.pop(batch, None)
        self._strikes.pop(batch, None)

    def _remember(self, batch: str) -> None:
        self._accepted_before[batch] = self._accepted
        if len(self._accepted_before) > MAX_KNOWN:
            self.forget(next(iter(self._accepted_before)))


def _add(batches: set[str], batch: str) -> None:
    if len(batches) < 2:  # noqa: PLR2004 - a second one proves that others are rejected, too
        batches.add(batch)
