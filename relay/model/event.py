"""Payloads of analytics events, and the partitions in which they travel upstream.

A payload is the body of one request of an SDK. The relay accepts, keeps and forwards it without
looking inside.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from msgspec import Struct


class EventsEndpoint(Enum):
    """Endpoint of LaunchDarkly's events service (events 5.2, 5.6).

    The value is the path, the name is stored in the spool's file.
    """

    BULK = "/bulk"
    MOBILE = "/mobile"
    CLIENT_SIDE = "/events/bulk/{}"
    BULK_DIAGNOSTIC = "/diagnostic"
    MOBILE_DIAGNOSTIC = "/mobile/events/diagnostic"
    CLIENT_SIDE_DIAGNOSTIC = "/events/diagnostic/{}"

    # `Enum.__hash__` is written in Python; partitions are looked up for each payload.
    __hash__ = object.__hash__

    @property
    def diagnostic(self) -> bool:
        """True if it takes diagnostic events: one per request, never joined."""
        return self in _DIAGNOSTIC

    @property
    def mobile(self) -> bool:
        """True if it is authenticated by the mobile key."""
        return self in _MOBILE

    @property
    def client_side(self) -> bool:
        """True if it is authenticated by the client-side ID in its path, without a key."""
        return self in _CLIENT_SIDE

    def path(self, environment_id: str = "") -> str:
        """Return the path upstream; client-side endpoints have the environment's ID in it."""
        return self.value.format(environment_id)


_DIAGNOSTIC = frozenset(
    {
        EventsEndpoint.BULK_DIAGNOSTIC,
        EventsEndpoint.MOBILE_DIAGNOSTIC,
        EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC,
    }
)
_MOBILE = frozenset({EventsEndpoint.MOBILE, EventsEndpoint.MOBILE_DIAGNOSTIC})
_CLIENT_SIDE = frozenset({EventsEndpoint.CLIENT_SIDE, EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC})


class Partition(NamedTuple):
    """Key of an ordered queue of payloads.

    Payloads of one partition arrive in order and may be joined into one batch; those of different
    partitions are independent of each other and never joined.

    Args:
        environment: name of the environment.
        endpoint: destination upstream.
        schema: `X-LaunchDarkly-Event-Schema` of analytics events; 0 for diagnostics.
        tags: `X-LaunchDarkly-Tags`, or empty.
        wrapper: `X-LaunchDarkly-Wrapper`, or empty.
    """

    environment: str
    endpoint: EventsEndpoint
    schema: int = 0
    tags: str = ""
    wrapper: str = ""


class Receipt(Struct, frozen=True):
    """Upstream's response to a batch.

    Args:
        status: HTTP status.
        date: upstream's clock in Unix seconds; None if the response has no date.
        retry_after: requested delay in seconds before the next attempt; None without one.
    """

    status: int
    date: float | None = None
    retry_after: float | None = None


class EventPayload(Struct, frozen=True, gc=False):
    """Body of one request of an SDK.

    Args:
        partition: queue to which it belongs.
        payload_id: the SDK's `X-LaunchDarkly-Payload-ID`; empty without one.
        body: decompressed body: the text of a JSON array; of diagnostics anything.
        received: time of arrival, by `clock.now`.
    """

    partition: Partition
    payload_id: str
    body: bytes
    received: float
