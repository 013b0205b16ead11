"""Decides about the delivery of events: the next step, the target, the headers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from relay.backoff import JITTER, LONGEST_REFUSED_DELAY, REFUSED_DELAY
from relay.errors import RETRYABLE_4XX
from relay.model.environment import EnvironmentSpec
from relay.model.event import Partition


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait after failures in a row, in seconds.

    Args:
        first: after the first one.
        growth: from one to the next: about half as long again as upstream has been away already.
        longest: the end of that; `Retry-After` counts up to it, too.
        refused: after a refusal of the key, as for flags; doubles each time.
        longest_refused: the end of that.
    """

    first: float = 1.0
    growth: float = 1.5
    longest: float = 300.0
    refused: float = REFUSED_DELAY
    longest_refused: float = LONGEST_REFUSED_DELAY

    def delay(self, failures: int, chance: float, *, refused: bool = False) -> float:
        """Return the seconds to wait after so many failures or refusals before this one."""
        first, growth, longest = self.first, self.growth, self.longest
        if refused:
            first, growth, longest = self.refused, 2.0, self.longest_refused
        full: float = min(longest, first * growth ** min(failures, 100))  # floats have an end
        return full * (1 - JITTER * chance)


@dataclass(frozen=True, slots=True)
class ForwarderTimings:
    """All times of the forwarder, in seconds.

    Args:
        flush_interval: for which posts gather in their lane, unless it fills up.
        between: two batches of a lane that has more, unless upstream has answered faster than
            that: it is not flooded after its absence.
        timeout: for one request.
        drain: for what waits when the relay ends.
        backoff: from failure to attempt.
    """

    flush_interval: float = 5.0
    between: float = 0.1
    timeout: float = 20.0
    drain: float = 4.0
    backoff: Backoff = Backoff()


class Step(Enum):
    """What follows an attempt to deliver a batch."""

    DONE = auto()
    AGAIN = auto()
    REFUSED = auto()
    SPLIT = auto()
    REJECT = auto()
    """A post is rejected alone. Who is to blame decides what follows."""
    QUARANTINE = auto()
    """The post is: it is kept for people."""
    SUSPECT = auto()
    """That is open: others of its lane are tried."""
    WAIT = auto()
    """That is open, and there are no others, or several are rejected: it is waited."""


BAD_REQUEST, TOO_LARGE = 400, 413


_OTHERS = {2: Step.DONE, 4: Step.REFUSED}
"""By the first digit of the status."""


def next_step(status: int | None, posts: int, failures: int) -> Step:
    """Decide what follows an attempt.

    Args:
        status: of the answer; None without one.
        posts: of the batch.
        failures: how often this batch, or the one that it is a half of, was rejected before.
    """
    # Proxies say 400 of anything, too; the reference tries once more as well.
    if status is None or status in RETRYABLE_4XX or (status == BAD_REQUEST and failures == 0):
        return Step.AGAIN
    if status == TOO_LARGE or (status == BAD_REQUEST and posts > 1):
        return Step.SPLIT
    if status == BAD_REQUEST:
        return Step.REJECT
    return _OTHERS.get(status // 100, Step.AGAIN)


def target(partition: Partition, spec: EnvironmentSpec | None) -> tuple[str, dict[str, str]] | None:
    """Return the path of a lane and the header with its key; None while it has no credential.

    The credential is the one that counts now, whatever counted when the post came.
    """
    endpoint = partition.endpoint
    if spec is None:
        return None
    if endpoint.client_side:
        found = spec.environment_id
        return None if found is None else (endpoint.path(found.value), {})
    key = spec.mobile_key if endpoint.mobile else spec.sdk_key
    return None if key is None else (endpoint.path(), {"Authorization": key.value})


def headers(partition: Partition, payload_id: str) -> dict[str, str]:
    """Return what is said about a batch (events 5.4); nothing else of SDKs' requests goes on."""
    said = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    if partition.endpoint.diagnostic:
        return said
    said["X-LaunchDarkly-Event-Schema"] = str(partition.schema)
    said["X-LaunchDarkly-Payload-ID"] = payload_id
    if partition.tags:
        said["X-LaunchDarkly-Tags"] = partition.tags
    if partition.wrapper:
        said["X-LaunchDarkly-Wrapper"] = partition.wrapper
    return said
