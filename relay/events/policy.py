"""Delivery policy of events: the next step, the delay, the target, the headers. Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from msgspec import Struct

from relay.backoff import REFUSED_KEY, Backoff
from relay.errors import RETRYABLE_4XX
from relay.model.environment import EnvironmentSpec
from relay.model.event import Partition


class ForwarderTimings(Struct, frozen=True):
    """Intervals and timeouts of the forwarder, in seconds.

    Args:
        flush_interval: time for which payloads gather in their partition, unless it fills up.
        between: longest pause between two batches of a backlog, so that upstream is not flooded
            after an outage; the pause is no longer than upstream's last answer took.
        timeout: limit for one request.
        drain: limit for the delivery of what is waiting at shutdown.
        backoff: delays after failures; `longest` limits `Retry-After`, too. The growth of 1.5 waits
            about half as long again as upstream has been away already.
        refused: delays while upstream refuses the key, as for flags.
    """

    flush_interval: float = 5.0
    between: float = 0.1
    timeout: float = 20.0
    drain: float = 4.0
    backoff: Backoff = Backoff(first=1.0, longest=300.0, growth=1.5)
    refused: Backoff = REFUSED_KEY


SpecOf = Callable[[str], EnvironmentSpec | None]
"""Function that returns the current description of an environment by its name."""


class Step(Enum):
    """Next step after an attempt to deliver a batch."""

    DONE = auto()
    RETRY = auto()
    REFUSED = auto()
    SPLIT = auto()
    REJECT = auto()
    """Upstream rejects a batch that cannot be split, or not yet; the evidence decides."""
    QUARANTINE = auto()
    """The payload is bad: keep it for inspection."""
    SUSPECT = auto()
    """Undecided: put it aside and try others of its partition first."""
    WAIT = auto()
    """Undecided, and there are no others or several are rejected: wait."""


BAD_REQUEST, TOO_LARGE, SERVER_ERROR = 400, 413, 500


_STEP_BY_CLASS = {2: Step.DONE, 4: Step.REFUSED}
"""Step by the first digit of the status; the others are retried."""


def next_step(
    status: int | None, payloads: int, failures: int, *, maybe_delivered: bool = False
) -> Step:
    """Decide on the next step after an attempt.

    Args:
        status: HTTP status of the response; None without a response.
        payloads: number of payloads in the batch.
        failures: number of earlier rejections of this batch, or of the batch it is a half of.
        maybe_delivered: True if upstream may have the batch already. Its halves would arrive a
            second time, under other ids, so it is split only when it is proven bad.
    """
    # Proxies answer 400 for reasons of their own; like ld-relay, retry it once.
    if status is None or status in RETRYABLE_4XX or (status == BAD_REQUEST and failures == 0):
        return Step.RETRY
    if status not in (BAD_REQUEST, TOO_LARGE):
        return _STEP_BY_CLASS.get(status // 100, Step.RETRY)
    if maybe_delivered or step_if_bad(status, payloads) is Step.QUARANTINE:
        return Step.REJECT
    return Step.SPLIT


def step_if_bad(status: int | None, payloads: int) -> Step:
    """Decide on the next step with a batch that is proven bad.

    Args:
        status: HTTP status of the last rejection.
        payloads: number of payloads in the batch.
    """
    return Step.SPLIT if status == TOO_LARGE or payloads > 1 else Step.QUARANTINE


def may_have_arrived(status: int | None) -> bool:
    """Return whether upstream may have a batch although it has not accepted it.

    Args:
        status: HTTP status of the response; None without a response. An error of a server may be
            that of a proxy, which has lost upstream's response.
    """
    return status is None or status >= SERVER_ERROR


def delay_after(
    step: Step,
    timings: ForwarderTimings,
    *,
    failures: int = 0,
    chance: float = 0.0,
    took: float = 0.0,
    retry_after: float | None = None,
) -> float:
    """Return the seconds to wait after a step.

    Args:
        step: the step.
        timings: the forwarder's timings.
        failures: number of equal steps in a row before this one.
        chance: random number from 0 to 1, for the jitter.
        took: seconds until upstream's response.
        retry_after: delay in seconds that upstream has asked for.
    """
    if step is Step.DONE:
        return min(timings.between, took)
    if step is Step.SPLIT:
        return 0.0
    if step in (Step.QUARANTINE, Step.SUSPECT):
        return timings.between
    backoff = timings.refused if step is Step.REFUSED else timings.backoff
    return max(backoff.delay(failures, chance), min(retry_after or 0.0, timings.backoff.longest))


def target(partition: Partition, spec: EnvironmentSpec | None) -> tuple[str, dict[str, str]] | None:
    """Return the path of a partition and the header with its key; None without a credential.

    The credential is the current one, even if the payloads came with an earlier one.
    """
    endpoint = partition.endpoint
    if spec is None:
        return None
    if endpoint.client_side:
        environment_id = spec.environment_id
        return None if environment_id is None else (endpoint.path(environment_id.value), {})
    key = spec.mobile_key if endpoint.mobile else spec.sdk_key
    return None if key is None else (endpoint.path(), {"Authorization": key.value})


def headers(partition: Partition, payload_id: str) -> dict[str, str]:
    """Return the headers of a batch (events 5.4); no others of the SDKs' requests are forwarded."""
    fields = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    if partition.endpoint.diagnostic:
        return fields
    fields["X-LaunchDarkly-Event-Schema"] = str(partition.schema)
    fields["X-LaunchDarkly-Payload-ID"] = payload_id
    if partition.tags:
        fields["X-LaunchDarkly-Tags"] = partition.tags
    if partition.wrapper:
        fields["X-LaunchDarkly-Wrapper"] = partition.wrapper
    return fields


def missing_setting(partition: Partition) -> str:
    """Return the hint to the option that a partition needs for its delivery."""
    if partition.endpoint.mobile:
        return f": set mobileKey (LD_MOBILE_KEY_{partition.environment})"
    if partition.endpoint.client_side:
        return f": set envId (LD_CLIENT_SIDE_ID_{partition.environment})"
    return f": set sdkKey (LD_ENV_{partition.environment})"
