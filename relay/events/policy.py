"""Delivery policy of events: the next step, the target, the headers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from relay.backoff import REFUSED_KEY, Backoff
from relay.errors import RETRYABLE_4XX
from relay.model.environment import EnvironmentSpec
from relay.model.event import Partition


@dataclass(frozen=True, slots=True)
class ForwarderTimings:
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


class Step(Enum):
    """Next step after an attempt to deliver a batch."""

    DONE = auto()
    RETRY = auto()
    REFUSED = auto()
    SPLIT = auto()
    REJECT = auto()
    """A payload was rejected alone; the evidence decides between the three below."""
    QUARANTINE = auto()
    """The payload is bad: keep it for inspection."""
    SUSPECT = auto()
    """Undecided: put it aside and try others of its partition first."""
    WAIT = auto()
    """Undecided, and there are no others or several are rejected: wait."""


BAD_REQUEST, TOO_LARGE = 400, 413


_STEP_BY_CLASS = {2: Step.DONE, 4: Step.REFUSED}
"""Step by the first digit of the status; the others are retried."""


def next_step(status: int | None, payloads: int, failures: int) -> Step:
    """Decide on the next step after an attempt.

    Args:
        status: HTTP status of the response; None without a response.
        payloads: number of payloads in the batch.
        failures: number of earlier rejections of this batch, or of the batch it is a half of.
    """
    # Proxies answer 400 for reasons of their own; like ld-relay, retry it once.
    if status is None or status in RETRYABLE_4XX or (status == BAD_REQUEST and failures == 0):
        return Step.RETRY
    if status == TOO_LARGE or (status == BAD_REQUEST and payloads > 1):
        return Step.SPLIT
    if status == BAD_REQUEST:
        return Step.REJECT
    return _STEP_BY_CLASS.get(status // 100, Step.RETRY)


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
