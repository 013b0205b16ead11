"""Frames between the feeder and its workers: a length, then MessagePack. Pure.

Both sides are always of one release, so the form has no version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from relay.model.credential import Credential, CredentialKind, EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload
from relay.model.item import Item
from relay.model.journal import SavedJournal
from relay.model.payload import Selector

MessageT = TypeVar("MessageT")

_LENGTH = 4
"""Bytes of the length before each frame."""

_CREDENTIALS: dict[CredentialKind, type[Credential]] = {
    each.kind: each for each in (SDKKey, MobileKey, EnvironmentID)
}

Series = tuple[str, str, str, str, str]
"""Labels of a count, as `telemetry.traffic.RequestLabels`."""


class _Message(Struct, frozen=True, array_like=True):
    pass


class EnvironmentPut(_Message, frozen=True, tag=1):
    """An environment exists, or has another spec.

    Args:
        number: of the environment, as long as this feeder lives.
        spec: without `expiries`.
        expiries: kind, text and expiry of each.
    """

    number: int
    spec: EnvironmentSpec
    expiries: tuple[tuple[CredentialKind, str, float], ...]

    @classmethod
    def of(cls, number: int, spec: EnvironmentSpec) -> EnvironmentPut:
        """Return the message for a spec."""
        expiries = tuple((each.kind, each.value, at) for each, at in spec.expiries)
        return cls(number, replace(spec, expiries=()), expiries)

    @property
    def complete(self) -> EnvironmentSpec:
        """The spec with its expiries."""
        expiries = tuple((_CREDENTIALS[kind](text), at) for kind, text, at in self.expiries)
        return replace(self.spec, expiries=expiries)


class EnvironmentGone(_Message, frozen=True, tag=2):
    """An environment does not exist any more."""

    number: int


class Listed(_Message, frozen=True, tag=3):
    """The environments are complete as they were put: this is the moment to carry that out.

    Args:
        known: True if there can be no others: an unknown credential may be refused.
        sharing: numbers of environments that have a credential of another one; the last of them
            that has it is the one that it opens.
    """

    known: bool
    sharing: tuple[int, ...] = ()


class Fed(_Message, frozen=True, tag=16):
    """All data that there are have been sent to a worker that has connected."""


class Data(_Message, frozen=True, tag=4):
    """Items of an environment.

    Args:
        number: of the environment.
        items: some of them.
        full: True if these are all, with those of the messages after it up to the last.
        last: False if more messages belong to this.
        evaluations: version of what is evaluated with them.
        change: number of the change, to be reported as `Applied`; 0 for what is no change to
            others.
        selector: name that upstream gives to the data after it; None for none.
        journal: of these data, if they are all, for a worker that has no journal yet.
    """

    number: int
    items: tuple[Item, ...]
    full: bool
    last: bool
    evaluations: int
    change: int = 0
    selector: Selector | None = None
    journal: SavedJournal | None = None


class Settled(_Message, frozen=True, tag=19):
    """All workers serve a change, and those before it.

    Args:
        number: of the environment.
        change: its number.
    """

    number: int
    change: int


class FiguresRequest(_Message, frozen=True, tag=18):
    """A worker shall report its figures now."""


class Refused(_Message, frozen=True, tag=17):
    """LaunchDarkly refuses the SDK key of an environment."""

    number: int


class Memberships(_Message, frozen=True, tag=5):
    """Memberships in big segments have changed, or their status.

    Args:
        number: of the environment.
        hashes: of the context keys; none if the status has changed only, None if they are unknown
            or too many.
    """

    number: int
    hashes: frozenset[str] | None


class Stored(_Message, frozen=True, tag=6):
    """A post of events is safe.

    Args:
        number: of the post.
        new: False if an SDK had sent it before.
        server_time: upstream's clock at its last response, in Unix seconds; 0 before the first.
    """

    number: int
    new: bool
    server_time: float


class NotStored(_Message, frozen=True, tag=7):
    """A post of events cannot be accepted."""

    number: int


class Answer(_Message, frozen=True, tag=8):
    """Answer to a request.

    Args:
        number: of the request.
        status: HTTP status; 0 if there is no response.
        headers: names and values.
        body: complete; the reason if there is no response.
    """

    number: int
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Hello(_Message, frozen=True, tag=9):
    """A worker has connected.

    Args:
        worker: its number.
        process: its process ID.
        holds: names of the environments of which it has data.
    """

    worker: int
    process: int
    holds: frozenset[str]


class Post(_Message, frozen=True, tag=10):
    """A post of events."""

    number: int
    payload: EventPayload


class PageRequest(_Message, frozen=True, tag=11):
    """A request for a page about the whole relay."""

    number: int
    path: str
    query: bytes


class WebhookRequest(_Message, frozen=True, tag=15):
    """A webhook that was received.

    Args:
        number: of the request.
        content: its body.
        signature: the header that signs it.
    """

    number: int
    content: bytes
    signature: str


class Applied(_Message, frozen=True, tag=20):
    """This worker serves a change, and those before it; as `Settled`."""

    number: int
    change: int


class FetchRequest(_Message, frozen=True, tag=12):
    """A request to LaunchDarkly without a key, as `model.reply.Fetch`."""

    number: int
    url: str
    headers: dict[str, str]
    within: float
    max_body: int


class Check(_Message, frozen=True, tag=13):
    """Upstream shall be checked for changes of an environment, as `DataSource.check`."""

    number: int
    reconnect: bool


class Figures(_Message, frozen=True, tag=14):
    """Figures of a worker: counts since the last message, and present values.

    Args:
        requests: counts of requests.
        new_streams: counts of streams that were opened.
        unusable: counts of unusable events, by environment.
        discarded: counts of dropped events, by environment.
        delays: durations of deliveries by environment: their sum, and counts by bucket.
        clients: open streams as `RequestMetrics.streams`, all of them.
        streams: open streams by environment and name of the stream, all of them.
        resident: bytes of memory; None if unknown.
        cpu: seconds of processor time since the start of the process.
        files: open file descriptors; None if unknown.
        answers: counts of answers to SDKs of FDv2, by environment, side, kind and reason.
        saved: bytes that these answers spared, by environment and side.
        delayed: streams that wait until others have read all data.
        unread: bytes of all data that clients have not read.
        cut: streams that were closed because their clients did not read, since the start of the
            process.
    """

    requests: tuple[tuple[Series, int], ...]
    new_streams: tuple[tuple[Series, int], ...]
    unusable: tuple[tuple[str, int], ...]
    discarded: tuple[tuple[str, int], ...]
    delays: tuple[tuple[str, float, tuple[int, ...]], ...]
    clients: tuple[tuple[Series, int], ...]
    streams: tuple[tuple[str, str, int], ...]
    resident: int | None
    cpu: float
    files: int | None
    answers: tuple[tuple[str, str, str, str, int], ...] = ()
    saved: tuple[tuple[str, str, int], ...] = ()
    reads: tuple[tuple[str, int, int], ...] = ()
    """Contexts whose memberships in big segments were read, by environment, and those for which
    that failed."""
    delayed: int = 0
    unread: int = 0
    cut: int = 0


FromFeeder = (
    EnvironmentPut
    | EnvironmentGone
    | Listed
    | Fed
    | Data
    | Memberships
    | Refused
    | FiguresRequest
    | Settled
    | Stored
    | NotStored
    | Answer
)
FromWorker = Hello | Post | PageRequest | WebhookRequest | FetchRequest | Check | Applied | Figures

FROM_FEEDER: msgspec.msgpack.Decoder[FromFeeder] = msgspec.msgpack.Decoder(FromFeeder)
FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)

_encoder = msgspec.msgpack.Encoder()


def frame(message: FromFeeder | FromWorker) -> bytes:
    """Return a message as one frame."""
    content = _encoder.encode(message)
    return len(content).to_bytes(_LENGTH) + content


class Frames(Generic[MessageT]):
    """Reads messages from pieces of a byte stream.

    Args:
        decoder: of the messages.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        self._decoder = decoder
        self._pieces: list[bytes] = []
        self._size = 0
        self._wanted = _LENGTH
        """Bytes from which on there may be a complete frame."""

    def __repr__(self) -> str:
        return f"<Frames: {self._size} of {self._wanted} bytes>"

    def feed(self, data: bytes) -> Iterator[MessageT]:
        """Yield the messages that a further piece completes.

        Raises:
            msgspec.MsgspecError: the other side is of another release.
        """
        self._pieces.append(data)
        self._size += len(data)
        if self._size < self._wanted:
            return
        stream = memoryview(b"".join(self._pieces))
        start = 0
        while True:
            end = start + _LENGTH
            self._wanted = _LENGTH
            if len(stream) < end:
                break
            end += int.from_bytes(stream[start:end])
            self._wanted = end - start
            if len(stream) < end:
                break
            yield self._decoder.decode(stream[start + _LENGTH : end])
            start = end
        self._pieces = [bytes(stream[start:])]
        self._size = len(stream) - start
