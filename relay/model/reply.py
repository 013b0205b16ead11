"""Response of LaunchDarkly to a request without a key, and the contract for sending one.

The contract stands here so that its users need not import the HTTP client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct


class Reply(Struct, frozen=True):
    """A complete response.

    Args:
        status: the status code.
        headers: values by name in lower case; the first one if a name is repeated.
        body: the decompressed body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Fetch(Protocol):
    """Sends a GET request without a key to LaunchDarkly."""

    async def __call__(
        self, url: str, *, headers: dict[str, str], within: float, max_body: int
    ) -> Reply:
        """Send the request and return the response.

        Raises:
            UpstreamUnavailable: there was no response.
        """
