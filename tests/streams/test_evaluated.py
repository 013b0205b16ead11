"""Evaluating streams: each client ends up with the results for its context, and gets no more."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from relay.bigsegments.memberships import Memberships
from relay.evaluation.client import EvalClient
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.data import Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.payload import EMPTY, Change
from relay.streams import channel as channel_module
from relay.streams import evaluated
from relay.streams.evalformats import EvalxFormat
from relay.streams.evaluated import EvaluatingChannel
from relay.streams.hub import Hub, StreamLimits
from relay.streams.transport import LAST_CHUNK, decode_chunks
from tests.streams.test_hub import Buffer, turns

NEW_DATA = Change((), (), replace=True)


@dataclass(frozen=True)
class Result:
    """Result of a flag."""

    value: bool
    version: int

    def entry(self, *, with_reasons):
        reason = b',"reason":{"kind":"OFF"}' if with_reasons else b""
        members = json.dumps(self.value).encode(), self.version, reason
        return b'{"value":%b,"variation":0,"version":%d%b}' % members


@dataclass(frozen=True)
class Program:
    """Flags that are on for some users: version and users by key."""

    version: int
    flags: dict[str, tuple[int, frozenset[str]]]
    asked: Counter = field(default_factory=Counter)
    """Number of evaluations by user."""

    @property
    def size(self):
        return len(self.flags)

    has_big_segments = False

    def body(self, context, memberships, *, with_reasons):
        results = self.results(context, self.flags, memberships)
        entries = {key: result.entry(with_reasons=with_reasons) for key, result in results.items()}
        members = (b'"%b":%b' % (key.encode(), entry) for key, entry in entries.items())
        text = b"{" + b",".join(members) + b"}"
        return EvalBody((text,), digest=text)

    def results(self, context, keys, memberships):
        user = context.get("user").key
        self.asked[user] += 1
        return {
            key: Result(user in users, version)
            for key, (version, users) in self.flags.items()
            if key in keys
        }

    def flags_touched_by(self, before):
        keys = self.flags.keys() | before.flags.keys()
        return frozenset(k for k in keys if self.flags.get(k) != before.flags.get(k))


class Programs:
    """Programs of an environment; while `slow`, they are not ready."""

    def __init__(self) -> None:
        self.newest: Program | None = None
        self.slow = False
        self._done = asyncio.Event()

    def current(self, sdk_kind):
        assert sdk_kind is SDKKind.BROWSER
        return None if self.slow else self.newest

    async def ready(self, sdk_kind):
        if self.slow:
            await self._done.wait()
        return self.newest

    def finish(self):
        self.slow = False
        self._done.set()
        self._done = asyncio.Event()


class Site:
    """A hub with an evaluating stream."""

    def __init__(self) -> None:
        self.programs = Programs()
        self.channel = EvaluatingChannel(self.programs, SDKKind.BROWSER, EvalxFormat())
        self.hub = Hub({}, StreamLimits(heartbeat_interval=0), {"eval": self.channel})

    def set(self, **flags: tuple[int, str]) -> None:
        """Publish data: each flag's version and the users for whom it is on."""
        newest = self.programs.newest
        version = 1000 if newest is None else newest.version + 1
        self.programs.newest = Program(
            version, {key: (own, frozenset(users)) for key, (own, users) in flags.items()}
        )
        self.hub.publish(EMPTY, NEW_DATA)

    def client(self, user: str, *, with_reasons: bool = False) -> Client:
        client = Client(user)
        raw = json.dumps({"kind": "user", "key": user}).encode()
        eval_client = EvalClient(
            raw, parse_context(raw), SDKKind.BROWSER, with_reasons=with_reasons
        )
        self.hub.subscribe("eval", client, client=eval_client)
        return client


class Client(Buffer):
    """Transport and SDK: keeps flags up to date by the messages."""

    def __init__(self, user: str) -> None:
        super().__init__()
        self.user = user

    @property
    def messages(self) -> list[tuple[str, dict]]:
        text = b"".join(decode_chunks(self.received.removesuffix(LAST_CHUNK))).decode()
        lines = (message.split("\n") for message in text.split("\n\n")[:-1])
        return [(name[7:], json.loads(data[6:])) for name, data in lines]

    def state(self) -> dict[str, bool] | None:
        """Return the values that the SDK has; None before its first put."""
        state: dict[str, dict] | None = None
        newest = 0
        for name, data in self.messages:
            if name == "put":
                state, newest = data, 0
                continue
            assert state is not None, "a change before the put"
            assert data["version"] >= newest, (
                "the versions of one pass are equal, later ones greater"
            )
            assert data["version"] > state.get(data["key"], {"version": 0})["version"], "ignored"
            newest = data["version"]
            state[data["key"]] = data
            if name == "delete":
                data["value"] = None
        if state is None:
            return None
        return {key: entry["value"] for key, entry in state.items() if entry["value"] is not None}


async def test_a_stream_begins_with_all_results_and_goes_on_with_those_that_changed():
    """A put, then a patch or delete for each change, with the version of the data."""
    site = Site()
    site.set(a=(1, "xy"), b=(5, "x"))
    client = site.client("x")
    await turns()
    site.set(a=(2, "y"), b=(5, "x"))
    await turns()
    site.set(a=(2, "y"))
    await turns()
    client.read()
    first, second, third = client.messages
    assert first == (
        "put",
        {
            "a": {"value": True, "variation": 0, "version": 1},
            "b": {"value": True, "variation": 0, "version": 5},
        },
    )
    patch = {"key": "a", "value": False, "variation": 0, "version": 1001, "flagVersion": 2}
    assert second == ("patch", patch)
    assert third == ("delete", {"key": "b", "version": 1002})
    client.abort()


async def test_a_change_without_another_result_is_silent():
    """As when a segment changes that the context is not in: only affected clients get a message."""
    site = Site()
    site.set(a=(1, "x"))
    concerned, other = site.client("y"), site.client("z")
    await turns()
    site.set(a=(1, "xy"))
    await turns()
    for client in (concerned, other):
        client.read()
    assert [name for name, _ in concerned.messages] == ["put", "patch"]
    assert [name for name, _ in other.messages] == ["put"]
    concerned.abort(), other.abort()


async def test_equal_contexts_are_evaluated_once():
    """A thousand streams of one context cost one evaluation and one chunk."""
    site = Site()
    site.set(a=(1, "x"))
    clients = [site.client("x") for _ in range(1000)]
    reasoned = site.client("x", with_reasons=True)
    await turns()
    assert site.programs.newest.asked["x"] == 2
    for client in clients:
        client.read()
    site.set(a=(2, "x"))
    await turns(200)
    assert site.programs.newest.asked["x"] == 2
    assert len({id(client._unread[0]) for client in clients}) == 1
    reasoned.read()
    assert all("reason" in data.get("a", data) for _, data in reasoned.messages)
    assert len(site.channel._clients) == 2
    for client in [*clients, reasoned]:
        client.abort()
    del client
    assert len(site.channel._clients) == 0


async def test_changes_of_one_turn_are_one_step():
    """A burst is evaluated once, at its end."""
    site = Site()
    site.set(a=(1, "x"))
    client = site.client("x")
    await turns()
    for version in range(2, 12):
        site.set(a=(version, "x"))
    await turns()
    client.read()
    assert [data.get("flagVersion") for _, data in client.messages] == [None, 11]
    client.abort()


async def test_a_client_waits_for_the_first_program():
    """Neither data nor a program: the stream is silent, then begins with a put."""
    site = Site()
    early = site.client("x")
    await turns()
    assert not early._unread
    site.programs.slow = True
    site.set(a=(1, "x"))
    late = site.client("x")
    await turns()
    assert not early._unread
    assert not late._unread
    site.programs.finish()
    await turns()
    for client in (early, late):
        client.read()
        assert client.state() == {"a": True}
        client.abort()


async def test_clients_keep_their_data_while_a_program_is_compiled():
    """They get the change when it is ready; clients that come meanwhile begin with the same data."""
    site = Site()
    site.set(a=(1, "x"))
    early = site.client("x")
    await turns()
    site.programs.slow = True
    site.set(a=(2, ""))
    await turns()
    late = site.client("x")
    site.set(a=(3, ""))
    late.read()
    assert late.state() == {"a": True}
    site.programs.finish()
    await turns()
    for client in (early, late):
        client.read()
        assert client.state() == {"a": False}
        assert client.messages[-1][1]["flagVersion"] == 3
        client.abort()


async def test_a_client_that_missed_too_much_starts_over(monkeypatch):
    """Pending output of a slow client is bounded; beyond, it gets a put and goes on from there."""
    monkeypatch.setattr(channel_module, "MAX_PENDING", 500)
    site = Site()
    site.set(a=(1, "x"))
    slow, quick = site.client("x"), site.client("x")
    await turns()
    while not slow._paused:
        slow.write(b"1\r\n\n\r\n")
    pending = slow.get_write_buffer_size()
    for version in range(2, 30):
        site.set(a=(version, "x" if version % 2 else ""))
        await turns()
    assert slow.get_write_buffer_size() == pending
    slow.received = b""
    slow._unread = slow._unread[:1]
    slow.read()
    slow.read()
    site.set(a=(30, "x"), b=(1, ""))
    await turns()
    slow.read()
    assert [name for name, _ in slow.messages] == ["put", "put", "patch", "patch"]
    assert slow.state() == {"a": True, "b": False}
    quick.read()
    quick.read()
    assert quick.state() == {"a": True, "b": False}
    slow.abort(), quick.abort()


async def test_polls_in_between_do_not_wait_for_evaluations(monkeypatch):
    """However long evaluation takes, the loop gets its turn after a slice of it."""
    monkeypatch.setattr(evaluated, "SLICE_TIME", 0.0)
    site = Site()
    site.set(a=(1, "x"))
    clients = [site.client(str(n)) for n in range(10)]
    done = 0
    while not all(client._unread for client in clients):
        before, done = done, sum(bool(client._unread) for client in clients)
        assert done <= before + 1
        await asyncio.sleep(0)
    for client in clients:
        client.abort()


async def test_a_failure_for_one_client_does_not_reach_the_others():
    """An exception for one context is reported, and the other clients are served."""
    site = Site()
    site.set(a=(1, "x"))
    clients = [site.client(user) for user in "xyz"]
    await turns()
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: reported.append(about))
    site.set(a=(2, ""))
    broken = site.programs.newest

    class Broken(Program):
        def results(self, context, keys, memberships):
            if context.get("user").key == "y":
                raise ZeroDivisionError
            return super().results(context, keys, memberships)

    site.programs.newest = Broken(broken.version, broken.flags)
    await turns()
    for client in clients:
        client.read()
    assert [len(client.messages) for client in clients] == [2, 1, 2]
    assert [type(about["exception"]) for about in reported] == [ZeroDivisionError]
    for client in clients:
        client.abort()


class MemberProgram(Program):
    """Flags that are on for members of a big segment."""

    has_big_segments = True

    def members_needed(self, context):
        return (context.get("user").key,)

    def results(self, context, keys, memberships):
        members = frozenset(key for key, each in memberships.items() if each.segments)
        flags = {key: (version, members) for key, (version, _) in self.flags.items()}
        return Program(self.version, flags).results(context, keys, {})


class SlowMembers:
    """Big segments in which everybody is a member, once each read has been let go on."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Semaphore(0)
        self.reads = 0

    def known(self, keys):
        return None

    async def memberships(self, keys):
        self.reads += 1
        await self.may_answer.acquire()
        membership = Membership(BigSegmentsStatus.HEALTHY, {"team.g1": True})
        return Memberships(dict.fromkeys(keys, membership), ())


async def test_a_client_that_comes_while_members_are_read_waits_for_its_own():
    """Its put is made with its memberships, and not with those of the ones before it."""
    site, members = Site(), SlowMembers()
    site.channel = EvaluatingChannel(site.programs, SDKKind.BROWSER, EvalxFormat(), members)
    site.hub = Hub({}, StreamLimits(heartbeat_interval=0), {"eval": site.channel})
    site.programs.newest = MemberProgram(1000, {"a": (1, frozenset())})
    first = site.client("x")
    await turns()
    assert members.reads == 1
    second = site.client("y")
    members.may_answer.release()
    await turns()
    for client in (first, second):
        client.read()
    assert (first.state(), second.state()) == ({"a": True}, None)
    members.may_answer.release()
    await turns()
    second.read()
    assert second.state() == {"a": True}
    for client in (first, second):
        assert len(client.messages) == 1
        client.abort()


async def test_many_changes_come_as_a_put(monkeypatch):
    """It is cheaper than patches; a client without a different result still gets none."""
    monkeypatch.setattr(evaluated, "MANY_FLAGS", 2)
    site = Site()
    site.set(a=(1, "x"), b=(1, "x"), c=(1, "x"))
    concerned, other = site.client("y"), site.client("z")
    await turns()
    site.set(a=(1, "xy"), b=(1, "xy"), c=(1, "x"))
    await turns()
    site.set(a=(1, "x"), b=(1, "xy"), c=(1, "x"))
    await turns()
    for client in (concerned, other):
        client.read()
    assert [name for name, _ in concerned.messages] == ["put", "put", "patch"]
    assert [name for name, _ in other.messages] == ["put"]
    assert concerned.state() == {"a": False, "b": True, "c": False}
    concerned.abort(), other.abort()


async def test_nothing_is_evaluated_without_clients():
    """Without clients no program is asked for, and none is kept."""
    site = Site()
    site.set(a=(1, "x"))
    client = site.client("x")
    await turns()
    client.abort()
    site.programs.current = None
    site.set(a=(2, "x"))
    await turns()
    assert site.channel._sent is None


class Interleavings(RuleBasedStateMachine):
    """Changes, slow programs, readers of any speed and turns of the loop in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.site = self.loop.run_until_complete(self._site())
        self.clients: list[Client] = []
        self.flags: dict[str, tuple[int, str]] = {}
        self.count = 0
        self._original_limits = channel_module.MAX_PENDING, evaluated.FAN_OUT_SLICE
        channel_module.MAX_PENDING, evaluated.FAN_OUT_SLICE = 800, 2

    @staticmethod
    async def _site() -> Site:
        return Site()

    def run(self, action) -> None:
        async def act() -> None:
            action()

        self.loop.run_until_complete(act())

    @rule(
        key=st.sampled_from("abc"), users=st.sampled_from(["", "x", "xy", "z"]), gone=st.booleans()
    )
    def change(self, key, users, gone):
        self.count += 1
        self.flags[key] = (self.count, users)
        if gone:
            del self.flags[key]
        flags = dict(self.flags)
        self.run(lambda: self.site.set(**flags))

    @rule(slow=st.booleans())
    def compile(self, slow):
        if slow:
            self.site.programs.slow = True
        else:
            self.run(self.site.programs.finish)

    @precondition(lambda self: len(self.clients) < 8)
    @rule(user=st.sampled_from("xyz"))
    def subscribe(self, user):
        self.run(lambda: self.clients.append(self.site.client(user)))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), limit=st.sampled_from([1, 700, 1 << 30]))
    def read(self, data, limit):
        client = data.draw(st.sampled_from(self.clients))
        self.run(lambda: client.read(limit))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data):
        client = data.draw(st.sampled_from(self.clients))
        self.clients.remove(client)
        self.run(client.abort)

    @rule(count=st.sampled_from([1, 5]))
    def turn(self, count):
        self.loop.run_until_complete(turns(count))

    def teardown(self):
        self.run(self.site.programs.finish)
        for _ in range(30):
            self.loop.run_until_complete(turns(5))
            for client in self.clients:
                self.run(client.read)
        wanted = self.flags
        has_data = self.site.programs.newest is not None
        try:
            for client in self.clients:
                state = {key: client.user in users for key, (_, users) in wanted.items()}
                assert client.state() == (state if has_data else None)
        finally:
            for client in self.clients:
                self.run(client.abort)
            self.loop.run_until_complete(turns())
            self.loop.close()
            channel_module.MAX_PENDING, evaluated.FAN_OUT_SLICE = self._original_limits


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
