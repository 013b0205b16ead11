"""Frames between the processes of a relay."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.item import Item, Kind
from relay.protocol.workers import (
    FROM_FEEDER,
    FROM_WORKER,
    Answer,
    Applied,
    Check,
    Data,
    EnvironmentGone,
    EnvironmentPut,
    Fed,
    FetchRequest,
    Figures,
    FiguresRequest,
    Frames,
    Hello,
    Listed,
    Memberships,
    NotStored,
    PageRequest,
    Post,
    Refused,
    Settled,
    Stored,
    frame,
)

SPEC = EnvironmentSpec(
    "main",
    SDKKey("sdk-1"),
    MobileKey("mob-1"),
    EnvironmentID("id-1"),
    ttl=60.0,
    allowed_origins=("https://a.example",),
    expiries=((SDKKey("sdk-0"), 12.5), (MobileKey("mob-0"), math.inf)),
)
ITEMS = (Item(Kind.FLAG, "lamp", 3, b'{"key":"lamp"}'), Item(Kind.SEGMENT, "gone", 4, None))
PAYLOAD = EventPayload(Partition("main", EventsEndpoint.BULK, 4, "tag"), "id", b"[{}]", 1.5)
SERIES = ("main", "/sdk/flags", "GET", "server", "Python")

FROM_A_FEEDER = [
    EnvironmentPut.of(7, SPEC),
    EnvironmentGone(7),
    Listed(known=True),
    Fed(),
    Data(7, ITEMS, True, False, 1_700_000_000),
    Memberships(7, None),
    Refused(7),
    FiguresRequest(),
    Settled(7, 2),
    Memberships(7, frozenset({"a"})),
    Stored(1, True, 1.5),
    NotStored(2),
    Answer(3, 200, ((b"content-type", b"text/plain"),), b"body"),
]
FROM_A_WORKER = [
    Hello(1, 4711, frozenset({"main"})),
    Post(1, PAYLOAD),
    PageRequest(2, "/status", b"expect=a"),
    FetchRequest(3, "https://x.example", {"a": "b"}, 1.0, 100),
    Check(7, reconnect=True),
    Applied(7, 2),
    Figures(
        ((SERIES, 2),), (), (("main", 1),), (), (("main", 0.5, (1, 0)),), (), (("main", "all", 3),),
        None, 1.25, 12, (("main", "server", "full", "no-state", 1),), (("main", "client", 7),),
    ),
]  # fmt: skip


@given(st.sampled_from([(FROM_FEEDER, FROM_A_FEEDER), (FROM_WORKER, FROM_A_WORKER)]), st.data())
def test_messages_arrive_however_the_stream_is_cut(side, data):
    decoder, messages = side
    stream = b"".join(map(frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    frames = Frames(decoder)
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += frames.feed(stream[start:end])
    assert received == messages


def test_a_spec_keeps_the_kinds_of_its_keys():
    (message,) = Frames(FROM_FEEDER).feed(frame(EnvironmentPut.of(7, SPEC)))
    assert message.complete == SPEC
    assert [type(key) for key, _ in message.complete.expiries] == [SDKKey, MobileKey]


def test_a_message_of_the_other_side_is_an_error():
    with pytest.raises(msgspec.ValidationError):
        list(Frames(FROM_FEEDER).feed(frame(FROM_A_WORKER[0])))


def test_a_reader_says_how_much_it_waits_for():
    frames = Frames(FROM_FEEDER)
    assert not list(frames.feed(frame(Listed(known=True))[:5]))
    assert repr(frames).startswith("<Frames: 5 of ")
