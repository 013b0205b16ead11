"""Streams of evaluated flags: each client gets the changes for its own context.

A channel knows the program (`relay.programs`) that its clients have the results of. When there is
a newer one, only the flags that may differ are evaluated under both, once for each distinct
context, and those with a different entry in the evalx response are sent: a change that affects no
result of a client costs it no byte, and no client polls.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

from relay import clock
from relay.evaluation.compiled.program import Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.metrics import MetricValue
from relay.model.payload import Change, Payload
from relay.programs import ProgramCache
from relay.protocol import clientside
from relay.registry import Grant
from relay.streams.channel import FAN_OUT_SLICE, Channel, Subscription
from relay.streams.ping import PingChannel
from relay.streams.transport import StreamTransport, encode_chunk

PINGS = "ping"
"""Name of the ping stream."""

EVALUATING: Mapping[SDKKind, str] = {
    SDKKind.MOBILE: "eval-mobile",
    SDKKind.BROWSER: "eval-browser",
}
"""Names of the evaluating streams by kind of client-side SDK."""

SLICE_TIME = 0.004
"""Seconds of evaluation in one turn of the event loop: polls in between wait no longer than for a
slice of shared bytes. A single evaluation is never interrupted."""


MANY_FLAGS = 200
"""Minimum number of flags, and a quarter of all, that may have changed for clients to get a put
instead of patches: from there on it costs less than to find and write each change."""

MANY_SHARE = 4
"""Divisor: 4 means "at least a quarter of all flags"."""


class EvalClient:
    """The context that a stream is evaluated for; shared by streams with equal contexts.

    Args:
        raw: the JSON of the context as it was received.
        context: parsed from it.
        with_reasons: True if the entries have reasons.
    """

    __slots__ = ("__weakref__", "context", "identity", "with_reasons")

    def __init__(self, raw: bytes, context: Context, *, with_reasons: bool = False) -> None:
        self.context = context
        self.with_reasons = with_reasons
        self.identity = blake2b(raw, digest_size=16, person=b"%d" % with_reasons).digest()
        """Digest of context and `with_reasons`; the JSON itself is not kept."""


class EvaluatingChannel(Channel[EvalClient]):
    """Channel of evaluated flags for one kind of SDK.

    Args:
        programs: compiled flags of the environment.
        sdk_kind: determines the flags that clients may see.
    """

    def __init__(self, programs: ProgramCache, sdk_kind: SDKKind) -> None:
        super().__init__()
        self._programs = programs
        self._sdk_kind = sdk_kind
        self._clients: WeakValueDictionary[bytes, EvalClient] = WeakValueDictionary()
        self._sent: Program | None = None
        """The program that clients have the results of, running fan-outs included."""
        self._awaiting_put: dict[Subscription, None] = {}
        """Subscriptions that wait for a program, and then for their put; all if none was sent yet.

        An ordered set.
        """
        self._is_behind = False
        """True if there may be a newer program than those sent or being compiled."""
        self._compiling: asyncio.Task[None] | None = None
        self._compiled: Program | None = None
        self._since: float | None = None

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Schedule a check for a newer program; changes of one turn of the loop share one check."""
        del change
        if not self.subscriptions:
            self._sent = None
        elif payload is not None:
            self._since = since if self._since is None else self._since
            self._check_soon()

    def subscribe(
        self,
        transport: StreamTransport,
        head: bytes,
        ends_at: float,
        count: MetricValue,
        client: EvalClient,
        *,
        grant: Grant[Any] | None,
    ) -> Subscription:
        """Register a client and write its put, now if there is a program."""
        known_client = self._clients.setdefault(client.identity, client)
        return super().subscribe(transport, head, ends_at, count, known_client, grant=grant)

    def forget(self, subscription: Subscription) -> None:
        """Remove a subscription whose connection is lost."""
        self._awaiting_put.pop(subscription, None)
        super().forget(subscription)

    def _opening_for(self, subscription: Subscription) -> bytes:
        if self._sent is None:
            self._awaiting_put[subscription] = None
            self._check_soon()
            return b""
        return _put(self._sent, self.subscriptions[subscription])

    def _close_pending(self) -> None:
        """Do nothing: a new subscriber begins with the results that the others have."""

    def _check_soon(self) -> None:
        self._is_behind = True
        self._schedule_slice()

    @property
    def _is_pending(self) -> bool:
        return self._compiling is None and (self._is_behind or self._compiled is not None)

    def _start_pending(self) -> None:
        """Start the fan-out for the newest program, once earlier fan-outs have finished."""
        if not self._is_pending or self._fan_outs:
            return
        program, self._compiled = self._compiled, None
        if program is None:
            self._is_behind = False
            program = self._programs.current(self._sdk_kind)
            if program is None:
                self._compiling = asyncio.create_task(self._compile())
                return
        since, self._since = self._since, None
        self._advance_to(program, since)

    async def _compile(self) -> None:
        try:
            self._compiled = await self._programs.ready(self._sdk_kind)
        finally:
            self._compiling = None
            self._schedule_slice()

    def _advance_to(self, program: Program, since: float | None) -> None:
        before, self._sent = self._sent, program
        awaiting_put, self._awaiting_put = self._awaiting_put, {}
        updated = {s: client for s, client in self.subscriptions.items() if s not in awaiting_put}
        if before is not None and updated:
            touched = program.flags_touched_by(before)
            many = len(touched) >= max(MANY_FLAGS, program.size / MANY_SHARE)
            if many:
                self._start(_ReplacementFanOut(before, program, updated, since))
            elif touched:
                self._start(_UpdateFanOut(before, program, touched, updated, since))
        if awaiting_put:
            newcomers = {s: client for s, client in self.subscriptions.items() if s in awaiting_put}
            self._start(_OpeningFanOut(program, newcomers))


def client_side_channels(
    programs: ProgramCache, ping_jitter: float = 0.0
) -> Mapping[str, Channel[Any]]:
    """Return the channels of client-side SDKs by name, for the hub.

    Args:
        programs: compiled flags of the environment.
        ping_jitter: maximum delay of pings in seconds.
    """
    evaluating = {
        name: EvaluatingChannel(programs, sdk_kind) for sdk_kind, name in EVALUATING.items()
    }
    return {PINGS: PingChannel(ping_jitter), **evaluating}


class _PersonalFanOut(ABC):
    """Fan-out of different bytes to each client, encoded once for all streams of the client.

    Args:
        receivers: the subscriptions at creation, with their clients.
        since: monotonic time of the first change in it; None if there is none.
    """

    def __init__(
        self, receivers: Mapping[Subscription, EvalClient], since: float | None = None
    ) -> None:
        self.since = since
        by_client: dict[EvalClient, list[Subscription]] = {}
        for subscription, client in receivers.items():
            by_client.setdefault(client, []).append(subscription)
        self._receivers = _flatten(by_client)
        self._client: EvalClient | None = None
        self._chunk = b""

    @abstractmethod
    def _encode_for(self, client: EvalClient) -> bytes:
        """Return the chunk for a client; empty if there is nothing to send."""

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        end, count = clock.monotonic() + SLICE_TIME, 0
        for client, subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            if client is not self._client:
                self._client, self._chunk = client, self._encode_for(client)
            if self._chunk:
                subscription.send(self._chunk)
            if clock.monotonic() > end:
                return False
        return count < FAN_OUT_SLICE


def _flatten(
    by_client: Mapping[EvalClient, Iterable[Subscription]],
) -> Iterator[tuple[EvalClient, Subscription]]:
    for client, subscriptions in by_client.items():
        for subscription in subscriptions:
            yield client, subscription


class _OpeningFanOut(_PersonalFanOut):
    """Puts for clients that subscribed before there was a program."""

    def __init__(self, program: Program, receivers: Mapping[Subscription, EvalClient]) -> None:
        super().__init__(receivers)
        self._program = program

    def _encode_for(self, client: EvalClient) -> bytes:
        return _put(self._program, client)


class _UpdateFanOut(_PersonalFanOut):
    """Patches and deletes for the results that differ between two programs."""

    def __init__(
        self,
        before: Program,
        after: Program,
        touched: frozenset[str],
        receivers: Mapping[Subscription, EvalClient],
        since: float | None,
    ) -> None:
        super().__init__(receivers, since)
        self._before, self._after = before, after
        self._touched = touched

    def _encode_for(self, client: EvalClient) -> bytes:
        context, with_reasons = client.context, client.with_reasons
        before = self._before.some(context, self._touched, with_reasons=with_reasons)
        after = self._after.some(context, self._touched, with_reasons=with_reasons)
        messages = clientside.changes(before, after, self._after.version)
        return encode_chunk(messages) if messages else b""


class _ReplacementFanOut(_PersonalFanOut):
    """Puts for clients with any result that differs between two programs."""

    def __init__(
        self,
        before: Program,
        after: Program,
        receivers: Mapping[Subscription, EvalClient],
        since: float | None,
    ) -> None:
        super().__init__(receivers, since)
        self._before, self._after = before, after

    def _encode_for(self, client: EvalClient) -> bytes:
        put = _put(self._after, client)
        return b"" if put == _put(self._before, client) else put


def _put(program: Program, client: EvalClient) -> bytes:
    return encode_chunk(
        clientside.put(program.all(client.context, with_reasons=client.with_reasons))
    )
