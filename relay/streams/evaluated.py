"""Streams that carry evaluated flags: each client gets what changed for its own context.

A channel knows which program its clients have (`relay.evaluations`). When there is a newer one,
only the flags that may differ between the two are evaluated under both, once for each distinct
context, and those whose entry of the evalx answer differs are sent: a change that concerns nobody
costs no client a byte, and nobody polls.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

from relay.evaluation.compiled.program import Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.metrics import MetricValue
from relay.model.payload import Change, Payload
from relay.programs import ProgramCache
from relay.protocol import clientside
from relay.streams.channel import FAN_OUT_SLICE, Channel, Subscription
from relay.streams.ping import PingChannel
from relay.streams.transport import StreamTransport, encode_chunk

PINGS = "ping"
"""The stream of pings."""

EVALUATING: Mapping[SDKKind, str] = {
    SDKKind.MOBILE: "eval-mobile",
    SDKKind.BROWSER: "eval-browser",
}
"""The evaluating stream of each kind of client-side SDK."""

SLICE_TIME = 0.004
"""Seconds of evaluation in one turn of the loop, so that polls in between wait no longer than for
a slice of shared bytes; an evaluation that takes longer by itself is not interrupted."""


MANY_FLAGS = 200
"""Where at least so many flags, and a quarter of all, may have changed, clients for whom any did
get a put: it costs less than to find and write each change. Below, patches pay."""

MANY_SHARE = 4
"""What makes a quarter of it."""


class EvalClient:
    """For whom a stream is evaluated. Streams of one channel with equal contexts share theirs.

    Args:
        raw: the JSON of the context as it was received.
        context: what it says.
        with_reasons: whether entries have reasons.
    """

    __slots__ = ("__weakref__", "context", "identity", "with_reasons")

    def __init__(self, raw: bytes, context: Context, *, with_reasons: bool = False) -> None:
        self.context = context
        self.with_reasons = with_reasons
        self.identity = blake2b(raw, digest_size=16, person=b"%d" % with_reasons).digest()
        """Equal for the same request; the JSON itself is not kept."""


class EvaluatingChannel(Channel[EvalClient]):
    """The evaluating streams of one kind of client.

    Args:
        evaluations: of the environment.
        sdk_kind: which flags its clients may see.
    """

    def __init__(self, evaluations: ProgramCache, sdk_kind: SDKKind) -> None:
        super().__init__()
        self._evaluations = evaluations
        self._sdk_kind = sdk_kind
        self._clients: WeakValueDictionary[bytes, EvalClient] = WeakValueDictionary()
        self._sent: Program | None = None
        """What clients have, those passes included that are on their way."""
        self._unopened: dict[Subscription, None] = {}
        """Who waits for a put because there is no program yet; everybody if nothing was sent."""
        self._is_behind = False
        """Whether there may be a newer program than those sent or being compiled."""
        self._compiling: asyncio.Task[None] | None = None
        self._compiled: Program | None = None
        self._since: float | None = None

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Note that there is news; it is looked at in the next turn, however much comes in this."""
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
    ) -> Subscription:
        """Take a client in and write its put, now if possible."""
        shared = self._clients.setdefault(client.identity, client)
        return super().subscribe(transport, head, ends_at, count, shared)

    def forget(self, subscription: Subscription) -> None:
        """Note that a client is gone."""
        self._unopened.pop(subscription, None)
        super().forget(subscription)

    def _opening_for(self, subscription: Subscription) -> bytes:
        if self._sent is None:
            self._unopened[subscription] = None
            self._check_soon()
            return b""
        return _put(self._sent, self.subscriptions[subscription])

    def _close_pending(self) -> None:
        """Nothing is pending for others only: newcomers begin with what the others have."""

    def _check_soon(self) -> None:
        self._is_behind = True
        self._schedule_slice()

    @property
    def _is_pending(self) -> bool:
        return self._compiling is None and (self._is_behind or self._compiled is not None)

    def _start_pending(self) -> None:
        """Make the step to the newest program a pass, once those before it are through."""
        if not self._is_pending or self._fan_outs:
            return
        program, self._compiled = self._compiled, None
        if program is None:
            self._is_behind = False
            program = self._evaluations.current(self._sdk_kind)
            if program is None:
                self._compiling = asyncio.create_task(self._compile())
                return
        since, self._since = self._since, None
        self._step_to(program, since)

    async def _compile(self) -> None:
        try:
            self._compiled = await self._evaluations.ready(self._sdk_kind)
        finally:
            self._compiling = None
            self._schedule_slice()

    def _step_to(self, program: Program, since: float | None) -> None:
        before, self._sent = self._sent, program
        unopened, self._unopened = self._unopened, {}
        opened = {s: who for s, who in self.subscriptions.items() if s not in unopened}
        if before is not None and opened:
            touched = program.flags_touched_by(before)
            many = len(touched) >= max(MANY_FLAGS, program.size / MANY_SHARE)
            if many:
                self._start(_Replacement(before, program, opened, since))
            elif touched:
                self._start(_Update(before, program, touched, opened, since))
        if unopened:
            present = {s: who for s, who in self.subscriptions.items() if s in unopened}
            self._start(_Openings(program, present))


def client_side_channels(
    evaluations: ProgramCache, ping_jitter: float = 0.0
) -> Mapping[str, Channel[Any]]:
    """Return the channels of client-side SDKs by name, for the hub.

    Args:
        evaluations: of the environment.
        ping_jitter: seconds up to which pings are delayed.
    """
    evaluating = {
        name: EvaluatingChannel(evaluations, audience) for audience, name in EVALUATING.items()
    }
    return {PINGS: PingChannel(ping_jitter), **evaluating}


class _PersonalFanOut(ABC):
    """A pass that has other bytes for each viewer; they are made once for all its streams.

    Args:
        receivers: those who are to get it.
        since: when the first change in it came; None if there is none.
    """

    def __init__(
        self, receivers: Mapping[Subscription, EvalClient], since: float | None = None
    ) -> None:
        self.since = since
        by_viewer: dict[EvalClient, list[Subscription]] = {}
        for subscription, viewer in receivers.items():
            by_viewer.setdefault(viewer, []).append(subscription)
        self._receivers = _flat(by_viewer)
        self._viewer: EvalClient | None = None
        self._chunk = b""

    @abstractmethod
    def _made_for(self, viewer: EvalClient) -> bytes:
        """Return the chunk for a viewer; empty for none."""

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        end, count = time.perf_counter() + SLICE_TIME, 0
        for viewer, subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            if viewer is not self._viewer:
                self._viewer, self._chunk = viewer, self._made_for(viewer)
            if self._chunk:
                subscription.send(self._chunk)
            if time.perf_counter() > end:
                return False
        return count < FAN_OUT_SLICE


def _flat(
    by_viewer: Mapping[EvalClient, Iterable[Subscription]],
) -> Iterator[tuple[EvalClient, Subscription]]:
    for viewer, subscriptions in by_viewer.items():
        for subscription in subscriptions:
            yield viewer, subscription


class _Openings(_PersonalFanOut):
    """The puts of those who came before there was a program."""

    def __init__(self, program: Program, receivers: Mapping[Subscription, EvalClient]) -> None:
        super().__init__(receivers)
        self._program = program

    def _made_for(self, viewer: EvalClient) -> bytes:
        return _put(self._program, viewer)


class _Update(_PersonalFanOut):
    """What is different between two programs."""

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

    def _made_for(self, viewer: EvalClient) -> bytes:
        context, with_reasons = viewer.context, viewer.with_reasons
        before = self._before.some(context, self._touched, with_reasons=with_reasons)
        after = self._after.some(context, self._touched, with_reasons=with_reasons)
        messages = clientside.changes(before, after, self._after.version)
        return encode_chunk(messages) if messages else b""


class _Replacement(_PersonalFanOut):
    """A put for those to whom anything is different between two programs."""

    def __init__(
        self,
        before: Program,
        after: Program,
        receivers: Mapping[Subscription, EvalClient],
        since: float | None,
    ) -> None:
        super().__init__(receivers, since)
        self._before, self._after = before, after

    def _made_for(self, viewer: EvalClient) -> bytes:
        put = _put(self._after, viewer)
        return b"" if put == _put(self._before, viewer) else put


def _put(program: Program, viewer: EvalClient) -> bytes:
    return encode_chunk(
        clientside.put(program.all(viewer.context, with_reasons=viewer.with_reasons))
    )
