"""What LaunchDarkly answers to a request that needs no key, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response.

    Args:
        status: its code.
        headers: by name in lower case; of several with one name the first.
        body: decompressed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Fetch(Protocol):
    """Asks LaunchDarkly for something that needs no key."""

    async def __call__(
        self, url: str, *, headers: dict[str, str], within: float, max_body: int
    ) -> Reply:
        """Return its answer.

        Raises:
            UpstreamUnavailable: there is none.
        """
