"""Sender of batches: one request upstream, and its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from isal import igzip
from msgspec import Struct

from relay import clock
from relay.errors import UpstreamUnavailable
from relay.events.policy import SpecOf, headers, missing_setting, target
from relay.events.store import Batch
from relay.model.event import Receipt
from relay.protocol.events import is_well_formed, join_arrays
from relay.protocol.urls import join

SMALL = 32 * 1024
"""Size in bytes up to which bodies are compressed in the event loop: a thread would take longer."""

LEVEL = 1
"""gzip level: level 2 takes twice as long for a few bytes less."""


class Attempt(Struct, frozen=True):
    """Result of an attempt to deliver a batch."""

    status: int | None
    """HTTP status of the response; None without one."""
    reason: str
    retry_after: float | None = None
    took: float = 0.0
    """Seconds until the response."""
    malformed: Sequence[int] = ()
    """Positions of payloads that are not well-formed; nothing was sent."""
    unclear: bool = False
    """True if a payload is nested too deeply to check, so that it must be sent alone; nothing was
    sent."""


class Upstream(Protocol):
    """Contract of the HTTP session, so that importing this module does not load the client."""

    async def post(
        self, url: str, body: bytes, *, headers: dict[str, str], within: float
    ) -> Receipt:
        """Send a body within so many seconds.

        Raises:
            UpstreamUnavailable: there is no response.
        """


class BatchSender:
    """Sends batches upstream.

    Args:
        upstream: HTTP session.
        base: URL of LaunchDarkly's events service.
        spec_of: returns the current description of an environment, with its credentials.
        timeout: limit for one request in seconds.
    """

    def __init__(self, upstream: Upstream, base: str, spec_of: SpecOf, timeout: float) -> None:
        self.server_times: dict[str, float] = {}
        """Upstream's clock at its last response, in Unix seconds, by environment."""
        self._upstream = upstream
        self._base = base
        self._spec_of = spec_of
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<BatchSender to {self._base}>"

    async def send(self, batch: Batch, bodies: Sequence[bytes]) -> Attempt:
        """Try to deliver a batch once."""
        partition = batch.partition
        destination = target(partition, self._spec_of(partition.environment))
        if destination is None:
            return Attempt(
                401, f"the environment has no credential for them{missing_setting(partition)}"
            )
        path, key = destination
        checked = not partition.endpoint.diagnostic  # diagnostics are forwarded as they are
        if sum(map(len, bodies)) > SMALL:
            packed = await asyncio.to_thread(_pack, bodies, checked=checked)
        else:
            packed = _pack(bodies, checked=checked)
        if isinstance(packed, Attempt):
            return packed
        del bodies  # free the memory during the request
        fields = headers(partition, batch.payload_id) | key
        url = join(self._base, path)
        began = clock.monotonic()
        try:
            receipt = await self._upstream.post(url, packed, headers=fields, within=self._timeout)
        except UpstreamUnavailable as e:
            return Attempt(None, e.reason)
        if receipt.date is not None:
            self.server_times[partition.environment] = receipt.date
        took = clock.monotonic() - began
        reason = f"HTTP error {receipt.status}"
        return Attempt(receipt.status, reason, receipt.retry_after, took)


def _pack(bodies: Sequence[bytes], *, checked: bool) -> bytes | Attempt:
    """Return the compressed body of a request, or why it cannot be sent; one body stays as it is.

    Args:
        bodies: bodies of a batch.
        checked: check that each is well-formed, as a malformed one would spoil the others.
    """
    verdicts = [is_well_formed(body) for body in bodies] if checked else []
    malformed = [position for position, verdict in enumerate(verdicts) if verdict is False]
    unclear = None in verdicts and len(bodies) > 1
    if malformed or unclear:
        return Attempt(None, "", malformed=malformed, unclear=unclear)
    return igzip.compress(bodies[0] if len(bodies) == 1 else join_arrays(bodies), LEVEL)
