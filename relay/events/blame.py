"""Decides who is to blame for a rejection: the post, or upstream.

A proxy that is misconfigured, or an events service in trouble, may reject everything for a while.
So a rejected post is set aside for good only if upstream takes others of its kind meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

STRIKES = 2
"""Rejections that convict a post: one could be the first moment of an outage."""

MAX_KNOWN = 10_000
"""Rejected batches that are remembered; of a forgotten one the evidence begins anew."""


class Evidence:
    """What upstream's answers say about the posts of one environment and endpoint.

    Batches are named by their payload ids. A rejection is a strike against a post if upstream has
    taken another batch since it rejected this post before, in company or alone, and has rejected
    nothing else since then. The next strike needs no further batch: with nothing else to compare,
    a post that is rejected again while no other is has to go some time.
    """

    def __init__(self) -> None:
        self.accepting = False
        """Whether upstream has taken the last batch on which it decided."""
        self._taken = 0
        """Batches that upstream has taken."""
        self._known: dict[str, int] = {}
        """How many it had taken when it last rejected each of these."""
        self._strikes: Counter[str] = Counter()
        self._rejected: set[str] = set()
        """Some of the batches that it has rejected since it last took one: two, if there were."""
        self._alone: set[str] = set()
        """The same of posts that were rejected alone."""

    @property
    def outage(self) -> bool:
        """Whether several posts are rejected, and no batch is taken."""
        return len(self._alone) > 1

    def knows(self, batch: str) -> bool:
        """Return whether a batch was rejected before, or the batch that it is a half of."""
        return batch in self._known

    def take(self, batch: str) -> None:
        """Note that upstream has taken a batch."""
        self.accepting = True
        self._taken += 1
        self._rejected.clear()
        self._alone.clear()
        self.forget(batch)

    def doubt(self, batch: str) -> None:
        """Note that upstream has rejected a batch that will be tried once more."""
        self.accepting = False
        self._know(batch)
        _add(self._rejected, batch)

    def split(self, batch: str, halves: Iterable[str]) -> None:
        """Note that upstream has rejected a batch, and that halves take its place."""
        self.doubt(batch)
        for half in halves:
            self._know(half)
        self.forget(batch)

    def reject(self, post: str) -> bool:
        """Note that upstream has rejected a post alone; return whether the post is to blame."""
        proven = self._taken > self._known.get(post, self._taken) or self._strikes[post] > 0
        if proven and self._rejected <= {post}:
            self._strikes[post] += 1
        if self._strikes[post] >= STRIKES:
            self._rejected.discard(post)
            self._alone.discard(post)
            self.forget(post)
            return True
        self.doubt(post)
        _add(self._alone, post)
        return False

    def forget(self, batch: str) -> None:
        """Forget a batch that waits no longer."""
        self._known.pop(batch, None)
        self._strikes.pop(batch, None)

    def _know(self, batch: str) -> None:
        self._known[batch] = self._taken
        if len(self._known) > MAX_KNOWN:
            self.forget(next(iter(self._known)))


def _add(some: set[str], batch: str) -> None:
    if len(some) < 2:  # noqa: PLR2004 - the second one shows that it is not only the first
        some.add(batch)
