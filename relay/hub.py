"""The fan-out of one environment: each change is encoded once per stream and written to everybody.

The hub knows bytes and subscribers; what the bytes mean is the business of the stream formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from relay.model.payload import Change, Payload


class StreamFormat(Protocol):
    """Turns payloads and changes into the bytes of one kind of stream. Pure."""

    def opening(self, payload: Payload) -> bytes:
        """Return the message that gives a new subscriber everything."""

    def update(self, change: Change) -> bytes:
        """Return the messages that bring a subscriber up to date; empty if they concern it not."""


class Hub:
    """Everybody who listens to one environment.

    Args:
        formats: stream name, such as `all`, to its format.
    """

    def __init__(self, formats: Mapping[str, StreamFormat]) -> None:
        self._formats = dict(formats)
        self._payload: Payload | None = None

    def publish(self, payload: Payload | None, change: Change) -> None:
        """Tell subscribers of a change; returns at once.

        Args:
            payload: what the environment serves now; None while it has no data of its own.
            change: what became different.
        """
        self._payload = payload
        del change
