"""The hub: each subscriber ends up with the current payload, or is disconnected."""

from __future__ import annotations

import asyncio
import json
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.model.credential import SDKKey
from relay.model.item import Item, Kind, parse
from relay.model.metrics import MetricValue
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.protocol.fdv1 import AllFormat
from relay.registry import Grant
from relay.streams import channel as channel_module
from relay.streams.admission import Admission
from relay.streams.hub import Hub, StreamLimits
from relay.streams.ping import PingChannel
from relay.streams.transport import HEARTBEAT, LAST_CHUNK, PING_CHUNK, decode_chunks, encode_chunk
from tests.support.admission import patient, small_sizes

HIGH, LOW = 2000, 500


class Buffer:
    """Transport whose client reads when the test says so."""

    def __init__(self) -> None:
        self.received = b""
        self.closed = False
        self._unread: list[bytes] = []
        self._protocol: asyncio.Protocol | None = None
        self._paused = False

    def set_protocol(self, protocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        assert not self.closed
        self._unread.append(data)
        if self.get_write_buffer_size() > HIGH and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def writelines(self, parts) -> None:
        for part in parts:
            self.write(part)

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._unread))

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, _name: str) -> None:
        return None

    def abort(self) -> None:
        self.closed = True
        self._unread.clear()
        self._protocol.connection_lost(None)

    def read(self, limit: int = 1 << 30) -> None:
        while self._unread and limit > 0:
            taken, rest = self._unread[0][:limit], self._unread[0][limit:]
            self.received += taken
            limit -= len(taken)
            self._unread[:1] = [rest] if rest else []
        if self._paused and self.get_write_buffer_size() <= LOW:
            self._paused = False
            self._protocol.resume_writing()

    def state(self) -> dict[str, int]:
        """Return the flag versions of an SDK that has read these bytes; they never go down."""
        state: dict[str, int] = {}
        text = b"".join(decode_chunks(self.received.removesuffix(LAST_CHUNK)))
        for message in text.replace(b":\n", b"").decode().split("\n\n")[:-1]:
            name, data = message.split("\n")
            message_data = json.loads(data.removeprefix("data: "))
            if name == "event: put":
                flags = message_data["data"]["flags"]
                put = {key: flag["version"] for key, flag in flags.items()}
                assert all(put.get(key, 1 << 30) >= version for key, version in state.items())
                state = put
            else:
                version, key = message_data["data"]["version"], message_data["data"]["key"]
                assert state.get(key, 0) < version, "sent twice, or in the wrong order"
                state[key] = version
        return state


def flag(key: str, version: int, size: int = 0) -> Item:
    pad = "x" * size
    return parse(Kind.FLAG, key, json.dumps({"key": key, "version": version, "pad": pad}).encode())


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Interleavings(RuleBasedStateMachine):
    """Changes, subscriptions, readers of any speed and turns of the loop in any order."""

    admission: Admission | None = None

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        limits = StreamLimits(heartbeat_interval=0)
        self.hub = Hub({"all": AllFormat()}, limits, admission=self.admission)
        self.payload: Payload | None = None
        self.version = 0
        self.buffers: list[Buffer] = []
        self.count = MetricValue()
        self._original_limits = channel_module.FAN_OUT_SLICE, channel_module.MAX_PENDING
        channel_module.FAN_OUT_SLICE, channel_module.MAX_PENDING = 2, 3000

    def run(self, action) -> None:
        """Run a callback as the loop would, without giving the hub a turn before or after."""
        asyncio._set_running_loop(self.loop)
        try:
            action()
        finally:
            asyncio._set_running_loop(None)

    @rule(key=st.sampled_from("abc"), size=st.sampled_from([0, 600, 2500]), full=st.booleans())
    def change(self, key, size, full):
        self.version += 1
        changes = ChangeSet((flag(key, self.version, size),), full=full or self.payload is None)
        if full and self.payload is not None:
            others = [item for item in self.payload if item.key != key]
            changes = ChangeSet((*others, *changes.items), full=True)
        self.payload, change = (self.payload or EMPTY).apply(changes)
        assert change is not None
        self.run(lambda: self.hub.publish(self.payload, change))

    @precondition(lambda self: len(self.buffers) < 8)
    @rule()
    def subscribe(self):
        buffer = Buffer()
        self.buffers.append(buffer)
        self.run(lambda: self.hub.subscribe("all", buffer, b"", self.count))

    @precondition(lambda self: self.buffers)
    @rule(data=st.data(), limit=st.sampled_from([1, 700, 1 << 30]))
    def read(self, data, limit):
        buffer = data.draw(st.sampled_from(self.buffers))
        self.run(lambda: buffer.read(limit))

    @precondition(lambda self: self.buffers)
    @rule(data=st.data())
    def leave(self, data):
        buffer = data.draw(st.sampled_from(self.buffers))
        self.buffers.remove(buffer)
        self.run(buffer.abort)

    @rule()
    def turn(self):
        self.loop.run_until_complete(asyncio.sleep(0))

    @invariant()
    def open_streams_are_counted(self):
        assert self.count.value == len(self.hub) == self.hub.streams["all"] == len(self.buffers)

    @invariant()
    def pending_output_is_bounded(self):
        for buffer in self.buffers:
            size = sum(len(item.json) + 100 for item in self.payload or ())
            assert buffer.get_write_buffer_size() <= 2 * (HIGH + size + 3000 + 3000)

    def teardown(self):
        for _ in range(30):
            self.loop.run_until_complete(turns(5))
            for buffer in self.buffers:
                self.run(buffer.read)
        wanted = {item.key: item.version for item in self.payload or ()}
        try:
            for buffer in self.buffers:
                assert buffer.state() == wanted
        finally:
            for buffer in list(self.buffers):
                self.run(buffer.abort)
            self.loop.close()
            channel_module.FAN_OUT_SLICE, channel_module.MAX_PENDING = self._original_limits


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class Admitted(Interleavings):
    """The same, where large data have to be admitted, and a few unread bytes stop all others."""

    def __init__(self) -> None:
        self._sizes = small_sizes(interval=0)
        self._sizes.__enter__()
        self.admission = patient(4000)
        super().__init__()

    def teardown(self):
        try:
            super().teardown()
            assert (self.admission.waiting, self.admission.unread) == (0, 0)
        finally:
            self._sizes.__exit__(None, None, None)


TestAdmitted = Admitted.TestCase
TestAdmitted.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def payload(*flags: Item) -> tuple[Payload, Change]:
    after, change = EMPTY.apply(ChangeSet(flags, full=True))
    assert change is not None
    return after, change


class CountingFormat(AllFormat):
    def __init__(self) -> None:
        self.encoded = 0

    def opening(self, payload):
        self.encoded += 1
        return super().opening(payload)

    def update(self, change):
        self.encoded += 1
        return super().update(change)


async def test_nothing_is_encoded_without_clients():
    """Without subscribers a change is not encoded."""
    stream_format = CountingFormat()
    hub = Hub({"all": stream_format})
    hub.publish(*payload(flag("a", 1)))
    await turns()
    assert stream_format.encoded == 0


async def test_all_clients_get_the_same_bytes():
    """The opening is encoded once, and all clients share one object."""
    stream_format = CountingFormat()
    hub = Hub({"all": stream_format})
    hub.publish(*payload(flag("a", 1)))
    buffers = [Buffer() for _ in range(3)]
    for buffer in buffers:
        hub.subscribe("all", buffer)
    assert stream_format.encoded == 1
    assert len({id(buffer._unread[0]) for buffer in buffers}) == 1
    for buffer in buffers:
        buffer.abort()


async def test_a_stream_begins_with_one_write(monkeypatch):
    """The head does not go out alone: each write of a transport is a packet."""
    hub = Hub({"all": AllFormat()})
    hub.publish(*payload(flag("a", 1)))
    buffer, writes = Buffer(), []
    monkeypatch.setattr(buffer, "writelines", writes.append)
    hub.subscribe("all", buffer, b"head")
    ((head, opening),) = writes
    assert head == b"head"
    assert b"event: put" in opening
    assert buffer._unread == []
    buffer.abort()


def test_the_hub_wakes_as_rarely_as_its_limits_allow():
    """Sweeps are as rare as the limits allow; a heartbeat has a timer of its own."""
    assert StreamLimits().sweep_interval == 5
    assert StreamLimits(stall_timeout=20).sweep_interval == 2
    assert StreamLimits(max_connection_time=900).sweep_interval == 1
    assert (
        StreamLimits(heartbeat_interval=0, max_connection_time=0, stall_timeout=0).sweep_interval
        == 5
    )


async def test_changes_of_one_turn_are_joined():
    """A burst is one write to each client."""
    hub = Hub({"all": AllFormat()})
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    buffer = Buffer()
    hub.subscribe("all", buffer)
    buffer.read()
    for version in range(2, 12):
        now, change = now.apply(ChangeSet((flag("a", version),)))
        hub.publish(now, change)
    await turns()
    assert len(buffer._unread) == 1
    assert buffer._unread[0].count(b"event: patch") == 10
    buffer.abort()


async def test_deliveries_are_timed_to_the_last_stream():
    """One duration for each change, or burst of them, over all slices; none for a heartbeat."""
    hub = Hub({"all": AllFormat()}, StreamLimits(heartbeat_interval=0.05))
    now, change = payload(flag("a", 1))
    hub.publish(now, change, since=0.0)
    assert len(hub.delays) == 0
    buffers = [Buffer() for _ in range(2 * channel_module.FAN_OUT_SLICE + 1)]
    for buffer in buffers:
        hub.subscribe("all", buffer)
        buffer.read()
    begin = time.monotonic() - 5
    for version in (2, 3):
        now, change = now.apply(ChangeSet((flag("a", version),)))
        hub.publish(now, change, since=begin + version)
    while not buffers[-1]._unread:
        assert len(hub.delays) == 0
        await asyncio.sleep(0)
    await turns()
    assert len(hub.delays) == 1
    assert 3 < hub.delays.total < 4
    async with asyncio.timeout(2):
        while buffers[-1]._unread[-1] is not HEARTBEAT:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(hub.delays) == 1
    for buffer in buffers:
        buffer.abort()


async def test_a_client_that_takes_nothing_is_disconnected():
    """No progress for the stall time ends a connection."""
    hub = Hub({"all": AllFormat()}, StreamLimits(0, 0, stall_timeout=0.05))
    hub.publish(*payload(flag("a", 1, 2 * HIGH)))
    buffer = Buffer()
    hub.subscribe("all", buffer)
    async with asyncio.timeout(2):
        while not buffer.closed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(hub) == 0


async def test_a_client_that_takes_a_little_stays():
    """A slow reader of a large opening is served to the end."""
    hub = Hub({"all": AllFormat()}, StreamLimits(0, 0, stall_timeout=0.2))
    hub.publish(*payload(flag("a", 1, 2 * HIGH)))
    buffer = Buffer()
    hub.subscribe("all", buffer)
    for _ in range(20):
        buffer.read(100)
        await asyncio.sleep(0.03)
    assert not buffer.closed
    buffer.abort()


async def test_close_aborts_clients_that_do_not_read():
    """Ending all streams takes no longer than the given time."""
    hub = Hub({"all": AllFormat()})
    buffers = [Buffer() for _ in range(3)]
    for buffer in buffers:
        hub.subscribe("all", buffer)
    async with asyncio.timeout(2):
        await hub.close(0.1)
    assert all(buffer.closed for buffer in buffers)


def test_framing_is_undone():
    """Decoding chunks yields the encoded data, message by message."""
    assert list(decode_chunks(encode_chunk(b"a\r\nb") + HEARTBEAT + encode_chunk(b"x" * 300))) == [
        b"a\r\nb",
        b":\n",
        b"x" * 300,
    ]


def subscribe_many(hub: Hub, stream: str, count: int = 1, client: object = None) -> list[Buffer]:
    """Return clients that have read their opening."""
    buffers = [Buffer() for _ in range(count)]
    for buffer in buffers:
        hub.subscribe(stream, buffer, client=client)
        buffer.read()
    return buffers


def pings(*buffers: Buffer) -> list[int]:
    """Return the number of pings that each has received; assert that there is nothing else."""
    for buffer in buffers:
        buffer.read()
        assert buffer.received == PING_CHUNK * (len(buffer.received) // len(PING_CHUNK))
    return [len(buffer.received) // len(PING_CHUNK) for buffer in buffers]


async def test_pings_of_one_turn_are_one():
    """A client polls once for a burst; one that comes with data there is pinged at once."""
    hub = Hub({}, channels={"ping": PingChannel()})
    (early,) = subscribe_many(hub, "ping")
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    await turns()
    assert pings(early) == [1]
    (late,) = subscribe_many(hub, "ping")
    assert pings(late) == [1]
    for version in range(2, 12):
        now, change = now.apply(ChangeSet((flag("a", version),)))
        hub.publish(now, change)
    await turns()
    assert pings(early, late) == [2, 2]
    assert len(hub.delays) == 2
    early.abort(), late.abort()


async def test_an_invisible_change_is_no_reason_to_poll():
    """Neither the tombstone of an unknown flag, nor a patch before there are data."""
    hub = Hub({}, channels={"ping": PingChannel()})
    (buffer,) = subscribe_many(hub, "ping")
    _, change = payload(flag("a", 1))
    hub.publish(None, change)
    await turns()
    assert pings(buffer) == [0]
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    now, change = now.apply(ChangeSet((Item(Kind.FLAG, "unknown", 4, None),)))
    await turns()
    hub.publish(now, change)
    await turns()
    assert pings(buffer) == [1]
    buffer.abort()


async def test_a_jitter_spreads_pings():
    """Each client has a delay of its own within the jitter; changes meanwhile add no ping."""
    hub = Hub({}, StreamLimits(heartbeat_interval=0), {"ping": PingChannel(0.5)})
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    buffers = subscribe_many(hub, "ping", 40)
    gone, *others = buffers
    assert pings(*buffers) == [1] * 40
    begin = time.monotonic()
    for version in (2, 3):
        now, change = now.apply(ChangeSet((flag("a", version),)))
        hub.publish(now, change)
    gone.abort()
    arrivals = []
    async with asyncio.timeout(5):
        while pings(*others) != [2] * 39:
            assert max(pings(*others)) <= 2
            arrivals.append(sum(pings(*others)))
            await asyncio.sleep(0.01)
    assert time.monotonic() - begin < 1.5
    assert len(set(arrivals)) > 5, "they come a few at a time"
    await asyncio.sleep(0.6)
    assert pings(*others) == [2] * 39
    hub.publish(*now.apply(ChangeSet((flag("a", 4),))))
    async with asyncio.timeout(5):
        while pings(*others) != [3] * 39:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for buffer in others:
        buffer.abort()


async def test_a_slow_client_owes_one_poll():
    """However many pings a client with a full buffer has missed, it gets one."""
    hub = Hub({}, channels={"ping": PingChannel()})
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    (buffer,) = subscribe_many(hub, "ping")
    while not buffer._paused:
        buffer.write(PING_CHUNK)
    for version in range(2, 12):
        now, change = now.apply(ChangeSet((flag("a", version),)))
        hub.publish(now, change)
        await turns()
    missed = buffer.get_write_buffer_size() // len(PING_CHUNK)
    buffer.read()
    assert pings(buffer) == [1 + missed + 1]
    buffer.abort()


async def test_objects_state_their_condition():
    """Streams by name, and a client's state, as a debugger shows them."""
    hub = Hub({"all": AllFormat()}, channels={"ping": PingChannel()})
    hub.publish(*payload(flag("a", 1)))
    buffer = Buffer()
    subscription = hub.subscribe("all", buffer)
    assert repr(hub) == "<Hub [all: 1, ping: 0]>"
    channel = hub._channels["all"]
    assert repr(channel) == "<BroadcastChannel [1 streams, 0 slow or ended, 0 delayed, 0 fan-outs]>"
    assert repr(subscription) == "<Subscription [fast]>"
    subscription.pause_writing()
    subscription.send(b"1\r\n\n\r\n")
    assert repr(subscription) == "<Subscription [slow, 6 bytes pending]>"
    subscription.end()
    assert repr(subscription) == "<Subscription [ended]>"
    assert repr(channel) == "<BroadcastChannel [0 streams, 1 slow or ended, 0 delayed, 0 fan-outs]>"
    buffer.abort()


def grant() -> Grant[str]:
    """A grant of its own each time."""
    return Grant("main", SDKKey("sdk-1"))


async def test_exactly_the_streams_of_a_grant_end():
    """They get the end of a chunked response; the others get the next change and no byte else."""
    hub, count = Hub({"all": AllFormat()}, channels={"ping": PingChannel()}), MetricValue()
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    ending, staying = grant(), grant()
    ended, stayed = [Buffer() for _ in range(300)], [Buffer() for _ in range(300)]
    for number, buffers in enumerate(zip(ended, stayed, strict=True)):
        for buffer, opened_with in zip(buffers, (ending, staying), strict=True):
            stream = "ping" if number % 3 == 0 else "all"
            hub.subscribe(stream, buffer, b"", count, grant=opened_with)
            buffer.read()
    unknown = Buffer()
    hub.subscribe("all", unknown, b"", count)
    unknown.read()
    before = [buffer.received for buffer in stayed]
    ending.revoked = True
    async with asyncio.timeout(5):
        closing = asyncio.create_task(hub.end_streams(ending, 1.0))
        while not all(buffer.closed for buffer in ended):  # noqa: ASYNC110
            await asyncio.sleep(0)
        for buffer in ended:
            buffer.read()
            assert buffer.received.endswith(LAST_CHUNK)
            buffer.abort()  # as a client does that has got the end
        await closing
    for buffer, received in zip(stayed, before, strict=True):
        buffer.read()
        assert buffer.received == received
        assert not buffer.closed
    assert len(hub) == count.value == 301
    now, change = now.apply(ChangeSet((flag("a", 2),)))
    hub.publish(now, change)
    await turns()
    for buffer in (*stayed, unknown):
        buffer.read()
        assert not buffer.closed
    assert unknown.state() == stayed[1].state() == {"a": 2}
    assert stayed[0].received.count(PING_CHUNK) == 2
    for buffer in (*stayed, unknown):
        buffer.abort()


async def test_a_revoked_client_that_does_not_read_is_cut_off():
    """Its time is over when the end of the stream has no room in its buffer, too."""
    hub = Hub({"all": AllFormat()})
    hub.publish(*payload(flag("a", 1, 2 * HIGH)))
    revoked, slow, other = grant(), Buffer(), Buffer()
    hub.subscribe("all", slow, grant=revoked)
    hub.subscribe("all", other, grant=grant())
    revoked.revoked = True
    async with asyncio.timeout(2):
        await hub.end_streams(revoked, 0.05)
    assert slow._unread == []
    assert len(hub) == 1
    assert not other.closed
    other.abort()


async def test_a_stream_that_is_opened_with_a_revoked_grant_ends_at_once():
    """Its request was accepted before, and took some time."""
    hub = Hub({"all": AllFormat()})
    revoked, buffer = grant(), Buffer()
    revoked.revoked = True
    hub.subscribe("all", buffer, grant=revoked)
    buffer.read()
    assert buffer.received == LAST_CHUNK
    assert buffer.closed
    assert len(hub) == 0
    buffer.abort()


async def test_a_resync_keeps_the_grant(monkeypatch):
    """A client that was too slow for the changes still ends with its credential."""
    monkeypatch.setattr(channel_module, "MAX_PENDING", 3000)
    hub = Hub({"all": AllFormat()})
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    opened_with, buffer = grant(), Buffer()
    hub.subscribe("all", buffer, grant=opened_with)
    for version in range(2, 8):
        now, change = now.apply(ChangeSet((flag("a", version, HIGH),)))
        hub.publish(now, change)
        await turns()
    buffer.read()
    buffer.read()
    assert buffer.state() == {"a": 7}
    opened_with.revoked = True
    async with asyncio.timeout(2):
        await hub.end_streams(opened_with, 0.05)
    assert buffer.closed
    assert len(hub) == 0


async def test_a_stream_that_is_resynced_while_others_end_is_not_forgotten(monkeypatch):
    """It has become another subscription since the list of those to end was made."""
    monkeypatch.setattr(channel_module, "MAX_PENDING", 3000)
    hub, revoked = Hub({"all": AllFormat()}), grant()
    now, change = payload(flag("a", 1))
    hub.publish(now, change)
    slow = Buffer()
    for buffer in [*(Buffer() for _ in range(60)), slow]:
        hub.subscribe("all", buffer, grant=revoked)
        if buffer is not slow:
            buffer.read()
    for version in range(2, 8):
        now, change = now.apply(ChangeSet((flag("a", version, HIGH),)))
        hub.publish(now, change)
        await turns()
    revoked.revoked = True
    ending = asyncio.create_task(hub.end_streams(revoked, 1.0))
    await asyncio.sleep(0)
    assert not slow.closed
    slow.read()
    slow.read()
    async with asyncio.timeout(5):
        while not slow.closed:  # noqa: ASYNC110
            await asyncio.sleep(0)
    slow.read()
    assert slow.received.endswith(LAST_CHUNK)
    assert slow.state() == {"a": 7}
    async with asyncio.timeout(5):
        await ending
