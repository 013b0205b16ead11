"""Flag delivery protocol v2 for client-side SDKs: transfers of evaluated flags (fdv2 13.3, 13.8.7).

The state that a client names is that of the environment's data, and marks of what else its results
depend on: `(p:…:7)~<client>.<memberships>`. With another context or kind of SDK, a client starts
over. With other memberships in big segments it gets all flags that depend on such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from typing import NamedTuple

import orjson
from msgspec import Struct
from msgspec.structs import replace

from relay.evaluation.client import EvalClient
from relay.evaluation.clientjournal import ClientDelta
from relay.evaluation.compiled.flag import CompiledResult
from relay.evaluation.compiled.fragments import DIGEST_SIZE, EvalBody, Form
from relay.evaluation.compiled.program import Program
from relay.evaluation.data import Membership
from relay.model.answers import UP_TO_DATE
from relay.model.journal import UNKNOWN, Full
from relay.model.payload import Selector
from relay.model.text import to_base64
from relay.protocol import fdv2
from relay.protocol.fdv2 import Event
from relay.protocol.sse import encode

KIND = b"flag-eval"
"""Kind of all objects."""

_MARK_SIZE = 9
"""Bytes of the mark of memberships; the same client has few different ones."""


class Framing(Struct, frozen=True, eq=False):
    """Form in which events become a text.

    Args:
        plain: form of all flags.
        reasoned: form of all flags with reasons.
        event: returns the text of one event.
        opening: begins a text.
        between: stands between two events.
        closing: ends a text.
    """

    plain: Form
    reasoned: Form
    event: Callable[[Event], bytes]
    opening: bytes = b""
    between: bytes = b""
    closing: bytes = b""

    def form(self, *, with_reasons: bool) -> Form:
        """Return the form of all flags."""
        return self.reasoned if with_reasons else self.plain

    def text(self, events: Iterable[Event]) -> bytes:
        """Return the text of whole events."""
        return self.opening + self.between.join(map(self.event, events)) + self.closing


class ClientState(NamedTuple):
    """Parts of the state that a client names."""

    data: str
    """State of the environment's data."""
    client: str
    """Identity of the client: its kind of SDK, its context, and if it gets reasons."""
    memberships: str
    """Mark of the memberships in big segments; empty without any."""

    def __str__(self) -> str:
        return f"{self.data}~{self.client}.{self.memberships}".removesuffix(".")

    @classmethod
    def of(cls, selector: Selector, client: EvalClient) -> ClientState:
        """Return the state of a client that has the results of some data."""
        return cls(selector.state, client.identity, _mark(client.memberships))

    @classmethod
    def parse(cls, basis: str) -> ClientState:
        """Return the parts of what a client names, which may be anything."""
        data, _, marks = basis.rpartition("~")
        client, _, memberships = marks.partition(".")
        return cls(data, client, memberships) if client else cls(basis, "", "")


def _mark(memberships: Mapping[str, Membership]) -> str:
    if not memberships:
        return ""
    values = [
        [key, each.status.value, dict(each.segments)] for key, each in sorted(memberships.items())
    ]
    text = orjson.dumps(values, option=orjson.OPT_SORT_KEYS)
    return to_base64(blake2b(text, digest_size=_MARK_SIZE).digest())


class Transfer(Struct, frozen=True, eq=False):
    """Answer to a client: all results, a delta, or nothing.

    Args:
        body: text of it.
        kind: `full`, `delta` or `none`.
        cause: of that, for those who operate the relay.
    """

    body: EvalBody
    kind: str
    cause: str


def respond(
    framing: Framing,
    program: Program,
    client: EvalClient,
    named: ClientState,
    answer: Full | ClientDelta,
) -> Transfer:
    """Return what a client needs to have the results of a program: all, a delta, or nothing.

    Args:
        framing: of the text.
        program: to give the results of.
        client: to evaluate for.
        named: what the client has named.
        answer: of the client journal, to the state of the data in it.
    """
    state = ClientState.of(program.selector, client)
    if any(named) and named.client != state.client:
        answer = UNKNOWN
    if isinstance(answer, Full):
        form = framing.form(with_reasons=client.with_reasons)
        flags = program.fill(form, client.context, client.memberships)
        body = full(framing, program.selector, flags, state, answer)
        # Some SDKs would show the tag for another basis than it came with (fdv2 13.5).
        body = replace(body, digest=b"") if any(named) else body
        return Transfer(body, answer.kind, answer.cause)
    keys = answer.keys
    if named.memberships != state.memberships:
        keys |= program.flags_with_big_segments
    if not keys and not answer.gone and named == state:
        return Transfer(EvalBody((framing.text(fdv2.nothing(program.selector)),)), *UP_TO_DATE)
    results = program.results(client.context, sorted(keys), client.memberships).values()
    gone = {item.key: item.version for item in answer.gone}
    reasons = client.with_reasons
    text = changes(framing, program.selector, results, gone, state, with_reasons=reasons)
    return Transfer(EvalBody((text,)), "delta", "stale")


def full(
    framing: Framing, selector: Selector, flags: EvalBody, state: ClientState, reason: Full
) -> EvalBody:
    """Return a transfer of all results, which replace all that a client has.

    Args:
        framing: of the text.
        selector: names the data of the results.
        flags: all results. The digest is that of them and the client, and so outlasts changes of
            other flags.
        state: of the client after it.
        reason: for it.
    """
    begin = framing.event(fdv2.intent(selector, b"xfer-full", reason.reason.encode()))
    end = framing.between + framing.event(fdv2.transferred(selector, str(state))) + framing.closing
    first, *others = flags.pieces
    digest = sha256(flags.digest + state.client.encode()).digest()[:DIGEST_SIZE]
    pieces = (framing.opening + begin + first, *others, end)
    return EvalBody(pieces, flags.shared, digest, end)


def changes(
    framing: Framing,
    selector: Selector,
    results: Iterable[CompiledResult],
    gone: Mapping[str, int],
    state: ClientState,
    *,
    with_reasons: bool,
) -> bytes:
    """Return a transfer of some results.

    Args:
        framing: of the text.
        selector: names the data of the results.
        results: of different flags.
        gone: versions of the flags that the client does not see any more, by key.
        state: of the client after it.
        with_reasons: include reasons.
    """

    def events() -> Iterator[Event]:
        yield fdv2.intent(selector, *fdv2.STALE)
        for result in results:
            yield b"put-object", (result.put(with_reasons=with_reasons),)
        for key, version in gone.items():
            yield fdv2.deleted(KIND, orjson.dumps(key), version)
        yield fdv2.transferred(selector, str(state))

    return framing.text(events())


def _form(start: bytes, end: bytes, *, with_reasons: bool) -> Form:
    """Return a form in which each `put-object` stands between two texts."""
    between = end + start

    def member(result: CompiledResult) -> bytes:
        return result.put(with_reasons=with_reasons)

    def frame(members: Sequence[bytes]) -> bytes:
        return start + between.join(members) + end if members else b""

    def join(results: Iterable[CompiledResult]) -> bytes:
        return frame([member(result) for result in results])

    return Form(with_reasons, member, frame, join)


def _framing(
    event: Callable[[Event], bytes],
    opening: bytes = b"",
    between: bytes = b"",
    closing: bytes = b"",
) -> Framing:
    start, _, end = (between + event((b"put-object", (b"|",)))).partition(b"|")
    plain = _form(start, end, with_reasons=False)
    reasoned = _form(start, end, with_reasons=True)
    return Framing(plain, reasoned, event, opening, between, closing)


def _in_object(event: Event) -> bytes:
    name, data = event
    return b"".join((b'{"event":"', name, b'","data":', *data, b"}"))


POLL = _framing(_in_object, b'{"events":[', b",", b"]}")
"""Text of the response to a poll."""

STREAM = _framing(lambda event: encode(event[0], *event[1]))
"""Text of messages of a stream."""
