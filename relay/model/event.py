"""Posts of analytics events, and the lanes in which they travel upstream.

A post is what one SDK sent in one request. The relay accepts it, keeps it and passes it on; it does
not look inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class EventsEndpoint(Enum):
    """Where events go upstream (events 5.2, 5.6). The value is the path, and the name in files."""

    BULK = "/bulk"
    MOBILE = "/mobile"
    CLIENT_SIDE = "/events/bulk/{}"
    BULK_DIAGNOSTIC = "/diagnostic"
    MOBILE_DIAGNOSTIC = "/mobile/events/diagnostic"
    CLIENT_SIDE_DIAGNOSTIC = "/events/diagnostic/{}"

    __hash__ = object.__hash__  # that of enumerations takes longer, and lanes are looked up often

    @property
    def diagnostic(self) -> bool:
        """Whether it takes diagnostics: one per request, never joined."""
        return self in _DIAGNOSTIC

    @property
    def mobile(self) -> bool:
        """Whether the mobile key opens it."""
        return self in _MOBILE

    @property
    def client_side(self) -> bool:
        """Whether the client-side ID in its path opens it, and no key goes with it."""
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
    """Posts of one lane arrive in order and may be joined into one batch; of two lanes never.

    Args:
        environment: its name.
        endpoint: where they go.
        schema: of analytics events, `X-LaunchDarkly-Event-Schema`; 0 for diagnostics.
        tags: `X-LaunchDarkly-Tags`, or empty.
        wrapper: `X-LaunchDarkly-Wrapper`, or empty.
    """

    environment: str
    endpoint: EventsEndpoint
    schema: int = 0
    tags: str = ""
    wrapper: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What upstream says to a post.

    Args:
        status: of HTTP.
        date: upstream's clock in Unix seconds; None if it did not tell.
        retry_after: seconds after which to try again; None if it did not ask for any.
    """

    status: int
    date: float | None = None
    retry_after: float | None = None


class EventPayload(NamedTuple):
    """What one SDK sent in one request.

    Args:
        partition: how it travels.
        payload_id: the SDK's `X-LaunchDarkly-Payload-ID`; empty if it gave none.
        body: decompressed. The text of a JSON array; of diagnostics anything.
        received: Unix seconds.
    """

    partition: Partition
    payload_id: str
    body: bytes
    received: float
