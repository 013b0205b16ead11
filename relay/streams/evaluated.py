"""Streams of evaluated flags: each client gets the changes for its own context.

A channel knows the program (`relay.programs`) that its clients have the results of. When there is
a newer one, only the flags that may differ are evaluated under both, once for each distinct
context, and those with a different entry in the evalx response are sent: a change that affects no
result of a client costs it no byte, and no client polls. In the same way it knows the memberships
in big segments that each client has the results of; new ones are read before they are needed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from msgspec import Struct

from relay import clock
from relay.bigsegments.environment import BigSegments
from relay.evaluation.client import EvalClient
from relay.evaluation.compiled.program import Program
from relay.evaluation.data import Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.evaluation.sdkkind import SDKKind
from relay.model.answers import AnswerCounter
from relay.model.payload import Change, Payload
from relay.programs import ProgramCache
from relay.protocol.bigsegments import context_hash
from relay.streams.admission import LARGE
from relay.streams.channel import FAN_OUT_SLICE, Channel, Subscription
from relay.streams.evalformats import EvalFormat, EvalxFormat, FlagEvalFormat
from relay.streams.ping import PingChannel
from relay.streams.transport import encode_chunk

STORE_ERROR = BigSegmentsStatus.STORE_ERROR

PINGS = "ping"
"""Name of the ping stream."""

EVALUATING: Mapping[SDKKind, str] = {
    SDKKind.MOBILE: "eval-mobile",
    SDKKind.BROWSER: "eval-browser",
}
"""Names of the evaluating streams by kind of client-side SDK."""

EVALUATING_FDV2: Mapping[SDKKind, str] = {
    SDKKind.MOBILE: "sdk/stream/eval-mobile",
    SDKKind.BROWSER: "sdk/stream/eval-browser",
}
"""Names of those that speak FDv2."""

KeyT = TypeVar("KeyT")
"""Key of the clients that get the same bytes."""

SLICE_TIME = 0.004
"""Seconds of evaluation in one turn of the event loop: polls in between wait no longer than for a
slice of shared bytes. A single evaluation is never interrupted."""


MANY_FLAGS = 200
"""Minimum number of flags, and a quarter of all, that may have changed for clients to get a put
instead of patches: from there on it costs less than to find and write each change."""

MAX_WAIT = 3.0
"""Seconds for which a client waits that seems to be ahead of this relay, as in `streams.deltas`."""

MEMBERS_AT_ONCE = 256
"""Clients whose memberships are read together."""

MANY_SHARE = 4
"""Divisor: 4 means "at least a quarter of all flags"."""


class EvaluatingChannel(Channel[EvalClient]):
    """Channel of evaluated flags for one kind of SDK.

    Args:
        programs: compiled flags of the environment.
        sdk_kind: determines the flags that clients may see.
        stream_format: encodes their results.
        big_segments: memberships in big segments; None if there is no database that has them.
    """

    def __init__(
        self,
        programs: ProgramCache,
        sdk_kind: SDKKind,
        stream_format: EvalFormat,
        big_segments: BigSegments | None = None,
    ) -> None:
        super().__init__()
        self._programs = programs
        self._format = stream_format
        self._sdk_kind = sdk_kind
        self._big_segments = big_segments
        self._changed_members: frozenset[str] | None = frozenset()
        """Hashes of context keys whose memberships may differ from what clients have; None for
        all."""
        self._version = 0
        """Version of the last messages; see `relay.protocol.clientside`."""
        self._clients: WeakValueDictionary[str, EvalClient] = WeakValueDictionary()
        self._sizes = {False: 0, True: 0}
        """Bytes of the last opening, for clients that have named no state, and for those that
        have."""
        self._bases: dict[Subscription, str] = {}
        """States that clients have named that wait for their opening."""
        self._sent: Program | None = None
        """The program that clients have the results of, running fan-outs included."""
        self._awaiting_put: dict[Subscription, None] = {}
        """Subscriptions that wait for a program, and then for their put; all if none was sent yet.

        An ordered set.
        """
        self._ahead: dict[Subscription, float] = {}
        """Those among them that seem to be ahead of this relay, and the monotonic time until which
        they wait for the change that their state has already."""
        self._ahead_timer: asyncio.TimerHandle | None = None
        self._is_behind = False
        """True if there may be a newer program than those sent or being compiled."""
        self._preparing: asyncio.Task[None] | None = None
        self._prepared: _Prepared | None = None
        self._since: float | None = None

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Schedule a check for a newer program; changes of one turn of the loop share one check."""
        del change
        if not self.subscriptions:
            self._sent = None
        elif payload is not None:
            self._since = since if self._since is None else self._since
            self._check_soon()

    def publish_memberships(self, hashes: frozenset[str] | None, since: float) -> None:
        """Schedule a check of the clients whose memberships in big segments have changed."""
        if not self.subscriptions:
            return  # those who come read what is stored
        changed = self._changed_members
        self._changed_members = None if hashes is None or changed is None else changed | hashes
        self._since = since if self._since is None else self._since
        self._check_soon()

    def _register(self, subscription: Subscription, client: EvalClient) -> None:
        if client.basis:
            # It holds for the opening only: a slow client that is started over gets everything.
            self._bases[subscription], client.basis = client.basis, ""
        super()._register(subscription, self._clients.setdefault(client.identity, client))

    def forget(self, subscription: Subscription) -> None:
        """Remove a subscription whose connection is lost."""
        self._awaiting_put.pop(subscription, None)
        self._bases.pop(subscription, None)
        self._ahead.pop(subscription, None)
        super().forget(subscription)

    def _opening_for(self, subscription: Subscription) -> bytes:
        sent = self._sent
        # Who comes with data may have the newest; it must not get those before.
        is_old = subscription in self._bases and sent and not self._programs.is_newest(sent)
        if sent is None or is_old or not self._has_members(sent, subscription):
            self._awaiting_put[subscription] = None
            self._check_soon()
            return b""
        if self._is_ahead(subscription):
            self._awaiting_put[subscription] = None
            return b""
        client, basis = self.subscriptions[subscription], self._bases.pop(subscription, "")
        opening = self._format.opening(sent, client, basis)
        if opening.answer is not None:
            opening.answer.add()
        chunk = encode_chunk(opening.messages)
        self._sizes[bool(basis)] = len(chunk)
        return chunk

    def _is_ahead(self, subscription: Subscription) -> bool:
        """Return whether a client is to wait for the change that its state has already."""
        basis = self._bases.get(subscription, "")
        if not (basis and self._format.is_behind(basis)):
            self._ahead.pop(subscription, None)
            return False
        now = clock.monotonic()
        if now >= self._ahead.setdefault(subscription, now + MAX_WAIT):
            del self._ahead[subscription]
            return False
        if self._ahead_timer is None:
            delay = min(self._ahead.values()) - now
            self._ahead_timer = asyncio.get_running_loop().call_later(delay, self._end_waiting)
        return True

    def _end_waiting(self) -> None:
        """Look again for those who have waited for long enough."""
        self._ahead_timer = None
        if self._ahead:
            self._check_soon()

    def _opening_size(self, subscription: Subscription) -> int:
        """Return the size of the last opening of this kind: to know it costs an evaluation."""
        return 0 if self._sent is None else self._sizes[subscription in self._bases]

    def _renew(self, subscription: Subscription) -> Subscription:
        basis = self._bases.get(subscription)
        new = super()._renew(subscription)
        if basis:
            self._bases[new] = basis
        return new

    def _has_members(self, program: Program, subscription: Subscription) -> bool:
        """Return whether the memberships that a client's flags need are there."""
        client = self.subscriptions[subscription]
        keys = self._lacking(program, client)
        if not keys or self._big_segments is None:
            return True
        known = self._big_segments.known(keys)
        if known is not None:
            client.memberships = known.by_key
        return known is not None

    def _lacking(self, program: Program, client: EvalClient) -> tuple[str, ...]:
        """Return the context keys of a client if any of their memberships is unknown."""
        keys = () if self._big_segments is None else program.members_needed(client.context)
        return () if all(key in client.memberships for key in keys) else keys

    def _close_pending(self) -> None:
        """Do nothing: a new subscriber begins with the results that the others have."""

    def _check_soon(self) -> None:
        self._is_behind = True
        self._schedule_slice()

    @property
    def _is_pending(self) -> bool:
        return self._preparing is None and (self._is_behind or self._prepared is not None)

    def _start_pending(self) -> None:
        """Start the fan-out for the newest program, once earlier fan-outs have finished."""
        if not self._is_pending or self._fan_outs:
            return
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            self._is_behind = False
            program = self._programs.current(self._sdk_kind)
            if program is None or (self._big_segments is not None and program.has_big_segments):
                self._preparing = asyncio.create_task(self._prepare())
                return
            prepared = _Prepared(program, {})
        since, self._since = self._since, None
        self._advance_to(prepared, since)

    async def _prepare(self) -> None:
        """Compile the newest program, and read the memberships that it needs."""
        try:
            program = await self._programs.ready(self._sdk_kind)
            if program is not None:
                self._prepared = _Prepared(program, await self._read_members(program))
        finally:
            self._preparing = None
            self._schedule_slice()

    async def _read_members(self, program: Program) -> dict[EvalClient, Mapping[str, Membership]]:
        """Return the memberships of clients that lack some, or whose own have changed.

        While the database is away, clients keep those that they have.
        """
        if self._big_segments is None or not program.has_big_segments:
            return {}
        changed, self._changed_members = self._changed_members, frozenset()
        found: dict[EvalClient, Mapping[str, Membership]] = {}
        clients = list(dict.fromkeys(self.subscriptions.values()))
        for start in range(0, len(clients), MEMBERS_AT_ONCE):
            wanted = {
                client: keys
                for client in clients[start : start + MEMBERS_AT_ONCE]
                if (keys := self._keys_to_read(program, client, changed))
            }
            all_keys = dict.fromkeys(key for keys in wanted.values() for key in keys)
            if not all_keys:
                await asyncio.sleep(0)
                continue
            read = (await self._big_segments.memberships(all_keys)).by_key
            for client, keys in wanted.items():
                members = {key: read[key] for key in keys}
                is_lost = any(each.status is STORE_ERROR for each in members.values())
                if not is_lost or not client.memberships:
                    found[client] = members
        return found

    def _keys_to_read(
        self, program: Program, client: EvalClient, changed: frozenset[str] | None
    ) -> tuple[str, ...]:
        lacking = self._lacking(program, client)
        if lacking or (changed is not None and not changed):
            return lacking
        keys = program.members_needed(client.context)
        if changed is None or any(context_hash(key) in changed for key in keys):
            return keys
        return ()

    def _advance_to(self, prepared: _Prepared, since: float | None) -> None:
        program = prepared.program
        before, self._sent = self._sent, program
        awaiting_put, self._awaiting_put = self._awaiting_put, {}
        moved: dict[EvalClient, Mapping[str, Membership]] = {}
        for client, memberships in prepared.memberships.items():
            if client.memberships != memberships:
                moved[client] = client.memberships
                client.memberships = memberships
        self._version = max(self._version + 1, program.version)
        updated = {
            s: client
            for s, client in self.subscriptions.items()
            if s not in awaiting_put and not s.is_delayed
        }
        if before is not None and updated:
            step = _Step(before, program, moved, self._version, self._format)
            touched = program.flags_touched_by(before)
            many = len(touched) >= max(MANY_FLAGS, program.size / MANY_SHARE)
            if many:
                self._start(_ReplacementFanOut(step, updated, since))
            elif touched:
                self._start(_UpdateFanOut(step, touched, updated, since))
            elif moved:
                affected = {s: client for s, client in updated.items() if client in moved}
                self._start(_UpdateFanOut(step, touched, affected, since))
        # Those who came while memberships were read may lack theirs.
        late = {s: None for s in awaiting_put if not self._has_members(program, s)}
        if late:
            self._awaiting_put |= late
            self._check_soon()
        ahead = {s: None for s in awaiting_put if s not in late and self._is_ahead(s)}
        self._awaiting_put |= ahead
        if len(late) + len(ahead) < len(awaiting_put):
            newcomers = {
                s: (client, self._bases.pop(s, ""))
                for s, client in self.subscriptions.items()
                if s in awaiting_put and s not in late and s not in ahead
            }
            self._start(_OpeningFanOut(program, newcomers, self._format))


class _Prepared(Struct, frozen=True, eq=False):
    """A program, and the memberships of clients that have others or none."""

    program: Program
    memberships: Mapping[EvalClient, Mapping[str, Membership]]


class _Step(Struct, frozen=True, eq=False):
    """The step from what clients have to what they get.

    Args:
        before: program that clients have the results of.
        after: program that they get the results of.
        moved: the earlier memberships of clients that have got others.
        version: of the messages.
        format: of the messages.
    """

    before: Program
    after: Program
    moved: Mapping[EvalClient, Mapping[str, Membership]]
    version: int
    format: EvalFormat

    def memberships_before(self, client: EvalClient) -> Mapping[str, Membership]:
        """Return the memberships that a client has the results of."""
        return self.moved.get(client, client.memberships)


def client_side_channels(
    programs: ProgramCache, ping_jitter: float = 0.0, big_segments: BigSegments | None = None
) -> Mapping[str, Channel[Any]]:
    """Return the channels of client-side SDKs by name, for the hub.

    Args:
        programs: compiled flags of the environment.
        ping_jitter: maximum delay of pings in seconds.
        big_segments: memberships in big segments; None if there is no database that has them.
    """
    formats = (
        (EVALUATING, EvalxFormat()),
        (EVALUATING_FDV2, FlagEvalFormat(programs.client_journal)),
    )
    evaluating = {
        name: EvaluatingChannel(programs, sdk_kind, stream_format, big_segments)
        for names, stream_format in formats
        for sdk_kind, name in names.items()
    }
    return {PINGS: PingChannel(ping_jitter), **evaluating}


class _PersonalFanOut(ABC, Generic[KeyT]):
    """Fan-out of different bytes to each client, encoded once for all streams of the client.

    Args:
        receivers: the subscriptions at creation, with the keys of their clients.
        since: monotonic time of the first change in it; None if there is none.
    """

    def __init__(self, receivers: Mapping[Subscription, KeyT], since: float | None = None) -> None:
        self.since = since
        by_client: dict[KeyT, list[Subscription]] = {}
        for subscription, client in receivers.items():
            by_client.setdefault(client, []).append(subscription)
        self._receivers = _flatten(by_client)
        self._client: KeyT | None = None
        self._chunk = b""
        self._answer: AnswerCounter | None = None
        """Counts the chunk, each time that it is sent; None if nobody counts it."""

    @abstractmethod
    def _encode_for(self, client: KeyT) -> bytes:
        """Return the chunk for a client; empty if there is nothing to send."""

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        end, count = clock.monotonic() + SLICE_TIME, 0
        for client, subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            if client is not self._client:
                if len(self._chunk) > LARGE and subscription.must_wait:
                    subscription.wait()  # the next one is as large; it is not evaluated in vain
                    continue
                self._client, self._chunk = client, self._encode_for(client)
            if self._chunk:
                subscription.send(self._chunk)
            if self._answer is not None:
                self._answer.add()
            if clock.monotonic() > end:
                return False
        return count < FAN_OUT_SLICE


def _flatten(
    by_client: Mapping[KeyT, Iterable[Subscription]],
) -> Iterator[tuple[KeyT, Subscription]]:
    for client, subscriptions in by_client.items():
        for subscription in subscriptions:
            yield client, subscription


class _OpeningFanOut(_PersonalFanOut[tuple[EvalClient, str]]):
    """Openings for clients that subscribed before there was a program.

    Args:
        program: to give the results of.
        receivers: the subscriptions, with their clients and the states that these have named.
        stream_format: encodes them.
    """

    def __init__(
        self,
        program: Program,
        receivers: Mapping[Subscription, tuple[EvalClient, str]],
        stream_format: EvalFormat,
    ) -> None:
        super().__init__(receivers)
        self._program = program
        self._format = stream_format

    def _encode_for(self, client: tuple[EvalClient, str]) -> bytes:
        opening = self._format.opening(self._program, *client)
        self._answer = opening.answer
        return encode_chunk(opening.messages)


class _UpdateFanOut(_PersonalFanOut[EvalClient]):
    """Messages for the results that differ between two programs."""

    def __init__(
        self,
        step: _Step,
        touched: frozenset[str],
        receivers: Mapping[Subscription, EvalClient],
        since: float | None,
    ) -> None:
        super().__init__(receivers, since)
        self._step = step
        self._touched = touched

    def _encode_for(self, client: EvalClient) -> bytes:
        context, step = client.context, self._step
        touched, former = self._touched, step.memberships_before(client)
        if former is not client.memberships:
            touched |= step.after.flags_with_big_segments
        before = step.before.results(context, touched, former)
        after = step.after.results(context, touched, client.memberships)
        messages = step.format.changes(step.after, client, before, after, step.version)
        return encode_chunk(messages) if messages else b""


class _ReplacementFanOut(_PersonalFanOut[EvalClient]):
    """All results for clients with any that differs between two programs."""

    def __init__(
        self,
        step: _Step,
        receivers: Mapping[Subscription, EvalClient],
        since: float | None,
    ) -> None:
        super().__init__(receivers, since)
        self._step = step

    def _encode_for(self, client: EvalClient) -> bytes:
        step = self._step
        flags = step.format.flags(step.after, client, client.memberships)
        before = step.format.flags(step.before, client, step.memberships_before(client))
        if flags.digest == before.digest:
            return b""
        return encode_chunk(step.format.put(step.after, client, flags))
