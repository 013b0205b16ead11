"""LaunchDarkly's list changes in any way, while requests come in between."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, cast

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from relay import clock
from relay.errors import InvalidData
from relay.model.credential import Credential, CredentialKind, EnvironmentID, MobileKey, SDKKey
from relay.web import access, routes
from relay.web.access import Access
from relay.web.responses import NO_ENVIRONMENTS
from tests.support import environments
from tests.support.clocks import SystemClock
from tests.support.environments import description, payload_filter
from tests.test_autoconfig import Configured

EXAMPLES = int(os.environ.get("EXAMPLES", "1000")) // 10
NAMES = ("alpha", "beta")
PARTS = ("", "north", "south")
CREDENTIALS: list[Credential] = [
    credential
    for name in NAMES
    for credential in (
        *(SDKKey(f"sdk-{name}-{n}") for n in (1, 2, 3)),
        *(MobileKey(f"mob-{name}-{n}") for n in (1, 2)),
        EnvironmentID(f"id-{name}"),
    )
]
Door = tuple[Credential, str]
"""A credential, and the payload filter that a request has beside it."""
DOORS: list[Door] = [(credential, part) for credential in CREDENTIALS for part in PARTS]
PATHS = {
    CredentialKind.SDK_KEY: "/sdk/latest-all",
    CredentialKind.MOBILE_KEY: "/msdk/evalx/contexts/e30",
    CredentialKind.ENVIRONMENT_ID: "/sdk/evalx/{}/contexts/e30",
}
UNKNOWN = "(the list is not known)"

NAME = st.sampled_from(NAMES)
VERSION = st.integers(0, 5)
KEY = st.sampled_from([1, 2, 3])
GRACE = st.none() | st.tuples(KEY, st.sampled_from([-5.0, 5.0, 10.0, 20.0]))
"""Number of a key that expires, and in how many seconds."""
FILTER_IDS = {"f1", "f2", "f3"}
FILTER_ID = st.sampled_from(sorted(FILTER_IDS))
FILTER = st.builds(payload_filter, st.sampled_from(PARTS), VERSION)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an environment's description; some are malformed, or lack a key."""
    name, version = draw(NAME), draw(VERSION)
    entry = description(name, version, draw(KEY), mobKey=f"mob-{name}-{draw(st.integers(1, 2))}")
    grace = draw(GRACE)
    if grace is not None:
        number, seconds = grace
        entry["sdkKey"]["expiring"] = {
            "value": f"sdk-{name}-{number}",
            "timestamp": round((clock.now() + seconds) * 1000),
        }
    match draw(st.integers(0, 9)):
        case 0:
            entry["version"] = f"{version}"
        case 1:
            entry["sdkKey"].pop("value")
    return entry


class Listed:
    """One environment of the model: who opens it, and until when."""

    def __init__(self) -> None:
        self.primary = ""
        self.mobile = ""
        self.expiring: dict[str, float] = {}

    def update(self, entry: dict[str, Any], now: float) -> None:
        """Keys follow offline-and-autoconfig 7.2: a grace period neither begins anew nor ends early."""
        key = entry["sdkKey"]
        self.primary = key.get("value", self.primary)
        self.mobile = entry["mobKey"]
        if "expiring" in key:
            until = key["expiring"]["timestamp"] / 1000
            self.expiring.setdefault(key["expiring"]["value"], until)
        self.expiring.pop(self.primary, None)
        self.expiring = {each: until for each, until in self.expiring.items() if until > now}


class Model:
    """The table of offline-and-autoconfig 7.4, written down as plainly as possible."""

    def __init__(self) -> None:
        self.known = False
        self.versions: dict[str, int] = {}
        """Of environments and filters, those that are gone included."""
        self.listed: dict[str, Listed] = {}
        self.filters: dict[str, str] = {}

    def put(self, listed: list[dict], broken: set[str], now: float) -> None:
        """Take over a whole list: what it does not name is forgotten, bad entries stay as they are."""
        for entry in listed:
            self.upsert(entry, broken, now)
        self._keep({entry["envID"] for entry in listed} | FILTER_IDS)

    def put_filters(self, filters: dict[str, dict]) -> None:
        for identifier, entry in filters.items():
            self.upsert_filter(identifier, entry)
        self._keep(filters.keys() | {f"id-{name}" for name in NAMES})

    def _keep(self, identifiers: set[str]) -> None:
        for table in (self.versions, self.listed, self.filters):
            for identifier in table.keys() - identifiers:
                del table[identifier]  # type: ignore[attr-defined]

    def upsert(self, entry: dict, broken: set[str], now: float) -> None:
        identifier = entry["envID"]
        if isinstance(entry["version"], str) or not self._is_news(identifier, entry["version"]):
            return
        is_new = identifier not in self.listed
        if is_new and ("value" not in entry["sdkKey"] or identifier in broken):
            del self.versions[identifier]  # the next put is another chance
            return
        self.listed.setdefault(identifier, Listed()).update(entry, now)

    def upsert_filter(self, identifier: str, entry: dict) -> None:
        if entry["key"] and self._is_news(identifier, entry["version"]):
            self.filters[identifier] = entry["key"]

    def delete(self, identifier: str, version: int) -> None:
        if self._is_news(identifier, version):
            self.listed.pop(identifier, None)
            self.filters.pop(identifier, None)

    def _is_news(self, identifier: str, version: int) -> bool:
        if version <= self.versions.get(identifier, -1):
            return False
        self.versions[identifier] = version
        return True

    def opened(self, door: Door, now: float) -> str:
        """Return the name of the environment that a door leads to; empty if it leads nowhere."""
        (credential, part) = door
        if part and part not in self.filters.values():
            return "" if self.known else UNKNOWN
        for identifier, listed in self.listed.items():
            keys = (listed.primary, listed.mobile, identifier)
            if credential.value in keys or listed.expiring.get(credential.value, 0.0) > now:
                return f"{identifier}/{part}" if part else identifier
        return "" if self.known else UNKNOWN


class Interleavings(RuleBasedStateMachine):
    """Each request gets what its credential opened when it began, or opens now; never what is past."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = SystemClock()
        self.clock.__enter__()
        self.runner = asyncio.Runner()
        self.runner.run(self.start())
        self.model = Model()
        self.last = b""
        self.held: dict[Door, Access] = {}
        """Access of requests that take long, as long as their credential opens the environment."""
        self.expected = dict.fromkeys(DOORS, UNKNOWN)
        self.generation = self.made.relay.registry.generation

    async def start(self) -> None:
        self.made = Configured()
        self.running = asyncio.create_task(self.made.relay.run())

    def teardown(self) -> None:
        async def stop() -> None:
            self.running.cancel()
            await asyncio.wait([self.running])

        self.run(stop())
        self.runner.close()
        self.clock.__exit__()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    def resolve(self, door: Door) -> Access | str:
        """Let a request come in; return its access, or why it has none."""
        (credential, part) = door
        path = PATHS[credential.kind].format(credential.value)
        found = routes.match(b"GET", path.encode())
        assert found is not None
        answer = access.resolve(
            self.made.relay,
            found.route,
            {b"authorization": credential.value.encode()},
            found.environment_id,
            b"filter=%b" % part.encode() if part else b"",
        )
        if isinstance(answer, Access):
            assert answer.environment in self.made.relay.environments.values()
            return answer
        assert (answer is NO_ENVIRONMENTS) or answer.status in (401, 404)
        return UNKNOWN if answer is NO_ENVIRONMENTS else ""

    def opened(self, door: Door) -> str:
        answer = self.resolve(door)
        return answer.environment.spec.name if isinstance(answer, Access) else answer

    def as_modelled(self) -> dict[Door, str]:
        return {door: self.model.opened(door, clock.now()) for door in DOORS}

    async def ask_meanwhile(self, stages: list[dict[Door, str]]) -> None:
        """Send requests until cancelled: each door goes from stage to stage, and never back."""
        reached = dict.fromkeys(DOORS, 0)
        while True:
            for door in DOORS:
                got = self.opened(door)
                left = [stage[door] for stage in stages[reached[door] :]]
                assert got in left, f"{door} led to {got}, not to one of {left}"
                reached[door] += left.index(got)
            await asyncio.sleep(0)

    async def settle(self, *messages: bytes, between: Sequence[dict[Door, str]] = ()) -> None:
        """Deliver messages while requests come in; then everything is as the model says.

        Args:
            messages: to deliver.
            between: what opens what while only a part of them has had its effect.
        """
        after = self.as_modelled()
        stages = [self.expected, *between, after]
        asking = asyncio.create_task(self.ask_meanwhile(stages))
        await asyncio.sleep(0)
        for message in messages:
            with suppress(InvalidData):  # the stream would log it, and connect again
                await self.made.stream.send(message)
        if asking.done():
            asking.result()
        asking.cancel()
        await asyncio.wait([asking])
        assert {door: self.opened(door) for door in DOORS} == after
        if self.model.known:
            names = set(self.made.relay.environments)
            parts = ("", *set(self.model.filters.values()))
            assert names == {f"{i}/{p}" if p else i for i in self.model.listed for p in parts}
        registry = self.made.relay.registry
        if after != self.expected and UNKNOWN not in self.expected.values():
            assert registry.generation != self.generation, "caches would not notice"
        self.expected, self.generation = after, registry.generation
        for door, held in list(self.held.items()):
            ends = self.expected[door] != held.environment.spec.name
            assert held.is_valid(registry) is not ends
            if ends:
                del self.held[door]

    @rule(
        listed=st.lists(entries(), max_size=2, unique_by=lambda e: cast("str", e["envID"])),
        filters=st.dictionaries(FILTER_ID, FILTER, max_size=3),
        broken=st.sets(st.sampled_from(["id-alpha", "id-beta"])),
    )
    def put(self, listed: list[dict], filters: dict[str, dict], broken: set[str]) -> None:
        """Some entries are unusable, and some environments cannot be made this time."""
        self.made.broken = broken
        self.model.put(listed, broken, clock.now())
        between = [self.as_modelled()]
        self.model.put_filters(filters)
        between.append(self.as_modelled())
        self.model.known = True
        self.last = environments.put(*listed, filters=filters)
        self.run(self.settle(self.last, between=between))

    @rule(entry=entries())
    def patch(self, entry: dict) -> None:
        self.made.broken = set()
        self.model.upsert(entry, set(), clock.now())
        self.last = environments.patch(entry)
        self.run(self.settle(self.last))

    @rule(name=NAME, version=VERSION)
    def delete(self, name: str, version: int) -> None:
        self.model.delete(f"id-{name}", version)
        self.last = environments.delete(name, version)
        self.run(self.settle(self.last))

    @rule(identifier=FILTER_ID, entry=FILTER)
    def patch_filter(self, identifier: str, entry: dict) -> None:
        self.model.upsert_filter(identifier, entry)
        self.last = environments.patch_filter(identifier, entry)
        self.run(self.settle(self.last))

    @rule(identifier=FILTER_ID, version=VERSION)
    def delete_filter(self, identifier: str, version: int) -> None:
        self.model.delete(identifier, version)
        self.last = environments.delete_filter(identifier, version)
        self.run(self.settle(self.last))

    @precondition(lambda self: self.last.startswith((b"event: patch", b"event: delete")))
    @rule()
    def again(self) -> None:
        """The last message comes twice; the second time it says nothing new."""
        entry = json.loads(self.last.split(b"data: ")[1]).get("data", {})
        if "value" in entry.get("sdkKey", {"value": ""}):
            self.run(self.settle(self.last))

    @rule(seconds=st.sampled_from([5.0, 10.0]), late=st.booleans())
    def let_time_pass(self, seconds: float, *, late: bool) -> None:
        """Keys expire by themselves, even if the timer that ends their streams is late."""
        self.clock.skip(seconds)

        async def expire() -> None:
            if not late:
                self.made.relay.expire()

        self.run(expire())
        self.expected = self.as_modelled()
        self.generation = -1
        self.run(self.settle())

    @rule(door=st.sampled_from(DOORS))
    def begin_request(self, door: Door) -> None:
        """A request that takes long keeps the access that it had when it began."""
        answer = self.resolve(door)
        if isinstance(answer, Access):
            self.held.setdefault(door, answer)


# Without shrinking, which would take minutes.
Interleavings.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestInterleavings = Interleavings.TestCase
