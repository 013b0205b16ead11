"""Environments and credentials change while requests of all kinds come in at both doors."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import os
import re
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import uvloop
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from relay.environment import Environment
from relay.model.credential import Credential, CredentialKind, EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload
from relay.model.item import Kind, parse
from relay.model.payload import ChangeSet
from relay.programs import ProgramCache
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.registry import Registry
from relay.relay import Relay
from relay.server.listeners import listen
from relay.server.options import ServerOptions
from relay.server.server import RelayServer, make_server
from relay.streams.evaluated import client_side_channels
from relay.streams.hub import Hub, StreamLimits
from relay.web.endpoints.events import EventsHandler
from relay.web.handlers import Handlers
from tests.support.contracts import ScriptedSource
from tests.support.credentials import CredentialTable
from tests.support.data import flag
from tests.support.serving import Address, Reply, ask, site_of, until

EXAMPLES = int(os.environ.get("EXAMPLES", "1000")) // 50
SLOTS = st.sampled_from([0, 1, 2])
SDK_KEYS = [SDKKey(f"sdk-{n}") for n in range(3)]
MOBILE_KEYS = [MobileKey(f"mob-{n}") for n in range(2)]
IDS = [EnvironmentID(f"id-{n}") for n in range(2)]
CREDENTIALS: list[Credential] = [*SDK_KEYS, *MOBILE_KEYS, *IDS]
LASTS = st.sampled_from([10.0, 20.0, None])
CONTEXTS = [
    base64.urlsafe_b64encode(b'{"kind":"user","key":"%b"}' % name).decode()
    for name in (b"anna", b"bert")
]
REFUSED = (401, 404)
OPEN = {"clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True}}
VALUE = re.compile(rb"value-(\d+)-")
LAST_CHUNK = b"0\r\n\r\n"


class Acceptor:
    """Keeps the events that are accepted."""

    def __init__(self) -> None:
        self.payloads: list[EventPayload] = []

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        self.payloads.append(payload)
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        accepted.set_result(True)
        return accepted

    def server_time(self, environment: str) -> float:
        return 0.0


class Place:
    """An environment with one flag, whose values tell that they are its own."""

    def __init__(self, number: int, spec: EnvironmentSpec) -> None:
        self.number = number
        self.version = 0
        self.source, programs = ScriptedSource(), ProgramCache()
        hub = Hub(
            {"all": AllFormat(), "flags": FlagsFormat()},
            StreamLimits(heartbeat_interval=0),
            client_side_channels(programs),
        )
        log = logging.getLogger("relay.env.test")
        self.environment = Environment(spec, self.source, hub, log, programs=programs)

    @property
    def value(self) -> bytes:
        return b"value-%d-%d" % (self.number, self.version)

    async def publish(self) -> None:
        """Deliver the next version of the flag."""
        self.version += 1
        value = self.value.decode()
        item = json.dumps(flag("flag", self.version, value, **OPEN)).encode()
        await self.source.give(ChangeSet((parse(Kind.FLAG, "flag", item),), full=self.version == 1))


class Client:
    """Something that lasts longer than a moment: a stream, or a request that is being sent.

    Args:
        credential: it was opened with.
        place: that the credential opened then.
        rest: of the request, still to be sent.
    """

    def __init__(self, credential: Credential, place: Place | None, rest: bytes = b"") -> None:
        self.credential = credential
        self.place = place
        self.rest = rest
        self.valid = place is not None
        """False once the credential has been revoked, if only for a moment."""
        self.received = b""
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, address: Address, request: bytes) -> None:
        reader, self._writer = await address.connect()
        self._writer.write(request)
        self._reading = asyncio.create_task(self._read(reader))

    def finish(self) -> None:
        assert self._writer is not None
        self._writer.write(self.rest)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            self.received += data

    @property
    def status(self) -> int:
        return int(self.received.split(b" ", 2)[1]) if b"\r\n\r\n" in self.received else 0

    @property
    def ended(self) -> bool:
        return self.received.endswith(LAST_CHUNK)

    @property
    def pings(self) -> int:
        return self.received.count(b"event: ping")

    async def close(self) -> None:
        if self._writer is not None and self._reading is not None:
            self._writer.close()
            await asyncio.wait([self._reading])
            with suppress(OSError):
                await self._writer.wait_closed()


class Doors:
    """A relay, its fast path and its application, each with a port of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.relay = Relay([], 0, registry=Registry(lambda: self.now))
        self.acceptor = Acceptor()
        self.addresses: dict[str, Address] = {}
        self._servers: list[RelayServer] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        site = site_of(Handlers.of(self.relay, events=EventsHandler(self.acceptor)))
        self._tasks.append(asyncio.create_task(self.relay.run()))
        for name, door in (("fast path", site.fast_path), ("application", None)):
            listener = listen(0)
            server = make_server(self.relay, site.app, ServerOptions(0, drain=0.2), door)
            self._servers.append(server)
            self._tasks.append(asyncio.create_task(server.serve(sockets=[listener])))
            self.addresses[name] = Address(listener.getsockname()[1])
        await until(lambda: all(server.started for server in self._servers))

    async def close(self) -> None:
        for server in self._servers:
            server.stop()
        await asyncio.wait(self._tasks[1:])
        self._tasks[0].cancel()
        await asyncio.wait(self._tasks)
        for _ in range(5):  # transports close in the next turns of the loop
            await asyncio.sleep(0)


class Prober:
    """Sends requests with any credential, and checks that it gets what the credential opens.

    Args:
        site: to send them to.
    """

    def __init__(self, site: Doors) -> None:
        self.site = site
        self.table = CredentialTable()
        self.etags: dict[Credential, str] = {}

    def opened_by(self, credential: Credential) -> Place | None:
        place = self.table.find(credential, self.site.now)
        assert place is None or isinstance(place, Place)
        return place

    def judge(self, reply: Reply, credential: Credential) -> Place | None:
        """Check that a request was accepted if it had to be; return the environment."""
        place = self.opened_by(credential)
        if place is None:
            assert reply.status in REFUSED, f"{credential} opens nothing"
            return None
        assert reply.status in (200, 202, 304), f"{credential} opens {place.environment}"
        client_id = place.environment.spec.environment_id
        assert reply.headers.get("x-ld-envid") == (client_id.value if client_id else None)
        return place

    async def ask_everything(self, address: Address, credential: Credential) -> None:
        if credential.kind is CredentialKind.SDK_KEY:
            await self.poll(address, credential, "/sdk/latest-all")
            await self.poll(address, credential, "/sdk/flags/flag")
        for context in CONTEXTS:
            await self.evaluate(address, credential, context)
        await self.post(address, credential)

    async def poll(self, address: Address, credential: Credential, path: str) -> None:
        """Poll with and without an ETag: that of the last response."""
        headers = [("Authorization", credential.value)]
        if etag := self.etags.get(credential):
            reply = await ask(address, path, [*headers, ("If-None-Match", etag)])
            self.judge(reply, credential)
        reply = await ask(address, path, headers)
        place = self.judge(reply, credential)
        if place is not None:
            assert place.value in reply.body
            self.etags[credential] = reply.headers["etag"]

    async def evaluate(self, address: Address, credential: Credential, context: str) -> None:
        """Evaluate as a server, mobile SDK or browser."""
        headers = [("Authorization", credential.value)]
        path = f"/sdk/evalx/contexts/{context}"
        if credential.kind is CredentialKind.MOBILE_KEY:
            path = f"/msdk/evalx/contexts/{context}"
        if credential.kind is CredentialKind.ENVIRONMENT_ID:
            path, headers = f"/sdk/evalx/{credential.value}/contexts/{context}", []
        reply = await ask(address, path, headers)
        place = self.opened_by(credential)
        browser = credential.kind is CredentialKind.ENVIRONMENT_ID
        if place is not None and browser and place.environment.spec.secure_mode:
            assert reply.status == 400, "there is no hash"
        elif (place := self.judge(reply, credential)) is not None:
            assert place.value in reply.body

    async def post(self, address: Address, credential: Credential) -> None:
        """Post an event, which belongs to the environment that the credential opens."""
        path, headers = self.events_of(credential)
        reply = await ask(address, path, headers, method="POST", body=b'[{"a":1}]')
        place = self.judge(reply, credential)
        if place is not None:
            payload = self.site.acceptor.payloads.pop()
            assert payload.partition.environment == place.environment.spec.name
        assert not self.site.acceptor.payloads

    def events_of(self, credential: Credential) -> tuple[str, list[tuple[str, str]]]:
        headers = [("X-LaunchDarkly-Event-Schema", "4"), ("Authorization", credential.value)]
        if credential.kind is CredentialKind.ENVIRONMENT_ID:
            return f"/events/bulk/{credential.value}", headers[:1]
        return "/mobile" if credential.kind is CredentialKind.MOBILE_KEY else "/bulk", headers


class Interleavings(RuleBasedStateMachine):
    """Each request is answered with the data of the environment that its credential opens then."""

    doors: tuple[str, ...] = ("application",)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.site = Doors()
        self.run(self.site.open())
        self.relay = self.site.relay
        self.places: dict[int, Place] = {}
        self.prober = Prober(self.site)
        self.table = self.prober.table
        self.streams: list[Client] = []
        self.requests: list[Client] = []
        self.made = 0
        self.opened: dict[Credential, Place | None] = dict.fromkeys(CREDENTIALS)
        """Place that each credential opened after the last change."""
        self.changed: set[Place] = set()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    def teardown(self) -> None:
        for client in (*self.streams, *self.requests):
            self.run(client.close())
        self.run(self.site.close())
        self.runner.close()

    # Changes.

    async def settle(self, *, late: bool = False) -> None:
        """Try what has changed, then let the timer come: streams of what was revoked end.

        Args:
            late: the timer does not come yet.
        """
        await self.try_changed()
        if late:
            return
        self.relay.expire()
        for client in (*self.streams, *self.requests):
            client.valid &= self.prober.opened_by(client.credential) is client.place
        for stream in [stream for stream in self.streams if not stream.valid]:
            await until(lambda s=stream: s.ended, 20)
            self.streams.remove(stream)
            await stream.close()
        assert not any(stream.ended for stream in self.streams)

    async def try_changed(self) -> None:
        """Send requests with all credentials that open something else now, or what has changed."""
        opened = {credential: self.prober.opened_by(credential) for credential in CREDENTIALS}
        for credential in CREDENTIALS:
            place = opened[credential]
            if place is not self.opened[credential] or place in self.changed:
                for door in self.doors:
                    await self.prober.ask_everything(self.site.addresses[door], credential)
        self.opened = opened
        self.changed.clear()

    def any_credential(self, data: st.DataObject, *kinds: CredentialKind) -> Credential:
        """Draw a credential, most often one that opens something."""
        choices = [each for each in CREDENTIALS if each.kind in (kinds or CredentialKind)]
        valid = [each for each in choices if self.prober.opened_by(each)]
        return data.draw(st.sampled_from([*valid, *valid, *choices]))

    def free_name(self, name: str, slot: int) -> str:
        taken = {place.environment.spec.name for n, place in self.places.items() if n != slot}
        return f"{name}-{slot}" if name in taken else name

    @rule(
        slot=SLOTS,
        key=st.sampled_from(SDK_KEYS),
        mobile=st.sampled_from([None, *MOBILE_KEYS]),
        client_id=st.sampled_from([None, *IDS]),
        name=st.sampled_from(["a", "b"]),
        ttl=st.sampled_from([0.0, 0.0, 60.0]),
        secure_mode=st.sampled_from([False, False, True]),
    )
    def put(self, slot, key, mobile, client_id, name, ttl, secure_mode):  # noqa: PLR0917
        """Add an environment, or change it in place."""

        async def put() -> None:
            place = self.places.get(slot)
            spec = EnvironmentSpec(
                self.free_name(name, slot), key, mobile, client_id,
                eval_streams=True, ttl=ttl, secure_mode=secure_mode,
            )  # fmt: skip
            if place is None:
                self.made += 1
                place = self.places[slot] = Place(self.made, spec)
                self.relay.put(place.environment)
                self.table.put(place, spec, self.site.now)
                await place.publish()
            else:
                expiries = place.environment.spec.expiries
                spec = replace(spec, expiries=tuple(e for e in expiries if e[0] != key))
                self.change(place, spec)
            await self.settle()

        self.run(put())

    def change(self, place: Place, spec: EnvironmentSpec) -> None:
        self.changed.add(place)
        self.relay.change(place.environment, spec)
        self.table.put(place, spec, self.site.now)

    @precondition(lambda self: self.places)
    @rule(data=st.data(), credential=st.sampled_from(CREDENTIALS), lasts=LASTS)
    def add_credential(self, data, credential, lasts):
        """Add a credential for some time or for ever, or change its expiry."""
        place = data.draw(st.sampled_from(list(self.places.values())))
        at = [] if lasts is None else [self.site.now + lasts]

        async def add() -> None:
            self.change(place, place.environment.spec.with_credential(credential, *at))
            await self.settle()

        self.run(add())

    @rule(data=st.data())
    def revoke(self, data):
        """Revoke a credential; an SDK key that is the environment's own is replaced."""
        credential = self.any_credential(data)

        async def revoke() -> None:
            place = self.prober.opened_by(credential)
            if place is None:
                return
            spec = place.environment.spec
            if credential == spec.sdk_key:
                spec = replace(spec, sdk_key=SDKKey(f"sdk-unused-{place.number}"))
            self.change(place, spec.without_credential(credential))
            await self.settle()

        self.run(revoke())

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def remove(self, data):
        """Remove an environment."""
        slot = data.draw(st.sampled_from(list(self.places)))

        async def remove() -> None:
            place = self.places.pop(slot)
            self.relay.remove(place.environment)
            self.table.remove(place)
            await self.settle()

        self.run(remove())

    @rule(seconds=st.sampled_from([5.0, 10.0]), late=st.booleans())
    def let_time_pass(self, seconds, late):
        """Credentials expire; the timer may be late."""
        self.site.now += seconds
        self.run(self.settle(late=late))

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def publish(self, data):
        """Change a flag: all streams of the environment tell it."""
        place = data.draw(st.sampled_from(list(self.places.values())))

        async def publish() -> None:
            await self.settle()
            streams = [stream for stream in self.streams if stream.place is place]
            pings = {stream: stream.pings for stream in streams}
            await place.publish()
            for stream in streams:
                await until(lambda s=stream: place.value in s.received or s.pings > pings[s], 20)
                assert set(VALUE.findall(stream.received)) <= {b"%d" % place.number}

        self.run(publish())

    # Requests.

    @rule(times=st.sampled_from([1, 3]), data=st.data())
    def request(self, times, data):
        """Poll, evaluate and post; more than once, as responses are cached."""
        credential = self.any_credential(data)
        address = self.site.addresses[data.draw(st.sampled_from(self.doors))]

        async def request() -> None:
            for _ in range(times):
                await self.prober.ask_everything(address, credential)

        self.run(request())

    @precondition(lambda self: len(self.streams) < 12)
    @rule(evaluated=st.booleans(), data=st.data())
    def open_stream(self, evaluated, data):
        """Of each kind; it lasts until its credential is revoked."""
        credential = self.any_credential(data)
        address = self.site.addresses[data.draw(st.sampled_from(self.doors))]
        path = "/all" if evaluated else "/flags"
        if credential.kind is CredentialKind.MOBILE_KEY:
            path = f"/meval/{CONTEXTS[0]}" if evaluated else "/mping"
        if credential.kind is CredentialKind.ENVIRONMENT_ID:
            value = credential.value
            path = f"/eval/{value}/{CONTEXTS[0]}" if evaluated else f"/ping/{value}"

        async def open_stream() -> None:
            place = self.prober.opened_by(credential)
            browser = credential.kind is CredentialKind.ENVIRONMENT_ID
            if place is not None and browser and evaluated and place.environment.spec.secure_mode:
                return
            stream = Client(credential, place)
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {credential.value}\r\n\r\n"
            await stream.send(address, head.encode())
            await self.begin(stream)

        self.run(open_stream())

    async def begin(self, stream: Client) -> None:
        """Wait for the first message of a stream, or its refusal."""
        await until(lambda: stream.status != 0)
        if stream.place is None:
            assert stream.status in REFUSED, f"{stream.credential} opens nothing"
            await stream.close()
            return
        assert stream.status == 200, f"{stream.credential} opens {stream.place.environment}"
        await until(lambda: stream.place.value in stream.received or stream.pings > 0)
        assert set(VALUE.findall(stream.received)) <= {b"%d" % stream.place.number}
        self.streams.append(stream)

    @precondition(lambda self: len(self.requests) < 4)
    @rule(stream=st.booleans(), data=st.data())
    def begin_request(self, stream, data):
        """Send half of a request."""
        kinds = CredentialKind.MOBILE_KEY, CredentialKind.SDK_KEY
        credential = self.any_credential(data, *(kinds[:1] if stream else kinds))
        address = self.site.addresses[data.draw(st.sampled_from(self.doors))]
        body = b'{"kind":"user","key":"anna"}' if stream else b'[{"kind":"custom"}]'
        path, headers = self.prober.events_of(credential)
        method, path = ("REPORT", "/meval") if stream else ("POST", path)
        headers = [*headers, ("Host", "x"), ("Content-Length", f"{len(body)}")]
        headers.append(("Content-Type", "application/json"))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers)

        async def begin() -> None:
            client = Client(credential, self.prober.opened_by(credential), body[9:])
            await client.send(address, head.encode() + b"\r\n" + body[:9])
            self.requests.append(client)

        self.run(begin())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish_request(self, data):
        """Send the rest: what was accepted is answered, but a stream of what was revoked ends."""
        client = data.draw(st.sampled_from(self.requests))
        self.requests.remove(client)

        async def finish() -> None:
            await self.settle()
            client.finish()
            await until(lambda: client.status != 0)
            is_stream = b"event-stream" in client.received
            if client.valid and is_stream:
                await self.begin(client)
            else:
                accepted = (200, 202) if client.valid else (200, 202, *REFUSED)
                assert client.status in accepted
                if is_stream:
                    await until(lambda: client.ended, 20)
                await client.close()
            self.site.acceptor.payloads.clear()

        self.run(finish())


class AtBothDoors(Interleavings):
    """The same with the fast path, and with both in turn."""

    doors = ("fast path", "application")


# Without shrinking, which would take minutes.
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = SETTINGS


TestAtBothDoors = AtBothDoors.TestCase
TestAtBothDoors.settings = SETTINGS


async def test_nothing_keeps_a_removed_environment_in_memory():
    """Its payload and programs may be large, and environments may come and go for ever."""
    site = Doors()
    await site.open()
    prober = Prober(site)

    async def serve(number: int) -> Place:
        """Make an environment that has had requests of all kinds."""
        sdk, mobile, client_id = SDK_KEYS[number], MOBILE_KEYS[number], IDS[number]
        spec = EnvironmentSpec(f"e{number}", sdk, mobile, client_id, eval_streams=True)
        place = Place(number, spec)
        site.relay.put(place.environment)
        prober.table.put(place, spec, site.now)
        await place.publish()
        for address in site.addresses.values():
            for credential in (sdk, mobile, client_id) * 3:
                await prober.ask_everything(address, credential)
        return place

    async def come_and_go() -> weakref.ref[Environment]:
        place = await serve(0)
        stream = Client(MOBILE_KEYS[0], place)
        head = f"GET /meval/{CONTEXTS[0]} HTTP/1.1\r\nHost: x\r\nAuthorization: mob-0\r\n\r\n"
        await stream.send(site.addresses["fast path"], head.encode())
        await until(lambda: place.value in stream.received)
        site.relay.remove(place.environment)
        prober.table.remove(place)
        await until(lambda: stream.ended)
        await stream.close()
        return weakref.ref(place.environment)

    try:
        environment = await come_and_go()
        await serve(1)  # caches notice a change with the next request
        await until(lambda: gc.collect() >= 0 and environment() is None, 10)
    finally:
        await site.close()
