"""Client-side SDKs that speak FDv2, cut anywhere and coming back: they end with all their results.

Relays restart from any older snapshot, with its journal or without, or from the data of before.

The channel, the journals, the programs and the encoders are the real ones. Clients are models of
SDKs (fdv2 13.2.3): what of a transfer came before a cut is void.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import nullcontext

import pytest

from relay.evaluation.client import EvalClient
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.item import Item, Kind, parse
from relay.model.journal import Journal, SavedJournal
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.programs import ProgramCache
from relay.protocol import sse
from relay.streams import evaluated
from relay.streams.evaluated import EVALUATING_FDV2, EvaluatingChannel, client_side_channels
from relay.streams.hub import Hub, StreamLimits
from tests.streams.test_hub import Buffer, turns
from tests.support import data
from tests.support.admission import patient, small_sizes
from tests.support.serving import until

SEEDS = range(int(os.environ.get("EXAMPLES", "40")))
STEPS = 80
KEYS = [f"flag-{n}" for n in range(12)]
SEGMENTS = ["s", "t"]
USERS = ["anna", "ben", "carla"]


class Site:
    """The hub of one environment, fed by random changes."""

    def __init__(self, chance: random.Random, limit: int | None) -> None:
        self._chance = chance
        self._admission = None if limit is None else patient(limit)
        self._version = 0
        self.payload: Payload | None = None
        self._snapshots: list[tuple[Payload, SavedJournal | None]] = []
        self.late: Payload | None = None
        """Data that a process had whose successor has not heard them from upstream yet."""
        self._begin()

    def _begin(self) -> None:
        self.journal = Journal("lineage")
        self.programs = ProgramCache(self.journal)
        channels = client_side_channels(self.programs)
        limits = StreamLimits(heartbeat_interval=0)
        self.hub = Hub({}, limits, channels, self._admission)

    def save(self) -> None:
        """Write a snapshot."""
        if self.payload is not None:
            self.journal.finish_naming()
            self._snapshots.append((self.payload, self.journal.saved(self.payload)))

    def restart(self) -> None:
        """Begin anew, from a snapshot with its journal or from data alone; all streams end.

        Upstream then sends everything, as it is now.
        """
        kept, self.payload = self.payload, None
        assert kept is not None
        self._begin()
        if self._snapshots and self._chance.random() < 0.7:
            payload, journal = self._chance.choice(self._snapshots[-4:])
            if journal is not None and self._chance.random() < 0.8:
                self.payload = payload
                self.journal.restore(journal, payload)
                self.programs.update(payload)
                self.hub.publish(payload, Change(tuple(payload), tuple(payload), replace=True))
            else:
                self.take(*payload, full=True)
            if self._chance.random() < 0.5:
                self.late = kept
                return
        self.take(*kept, full=True)

    def catch_up(self) -> None:
        """Let upstream send what was lost with the process, if it has not yet."""
        if self.late is not None:
            kept, self.late = self.late, None
            self.take(*kept, full=True)

    def take(self, *items: Item, full: bool = False) -> None:
        """Apply items of upstream."""
        full = full or self.payload is None
        self.payload, change = (self.payload or EMPTY).apply(ChangeSet(items, full=full))
        if change is not None:
            self.journal.record(self.payload, change, full=full)
            self.programs.update(self.payload)
            self.hub.publish(self.payload, change)

    def change(self) -> None:
        """Change, hide, delete or create a few items, or send everything anew."""
        chance = self._chance
        self.catch_up()
        if self.payload is None or chance.random() < 0.08:
            keys = chance.sample(KEYS, chance.randint(8, len(KEYS)))
            self.take(*map(self._flag, keys), *map(self._segment, SEGMENTS), full=True)
            return
        for _ in range(chance.choice([1, 1, 1, 2])):
            what = chance.random()
            if what < 0.3:
                self.take(self._segment(chance.choice(SEGMENTS)))
            elif what < 0.45:
                self._version += 1
                self.take(Item(Kind.FLAG, chance.choice(KEYS), self._version, None))
            else:
                self.take(self._flag(chance.choice(KEYS)))

    def _flag(self, key: str) -> Item:
        chance, self._version = self._chance, self._version + 1
        clause = {"attribute": "", "op": "segmentMatch", "values": [chance.choice(SEGMENTS)]}
        members: dict = {"variations": [chance.randint(0, 3), "other", "rule"], "salt": ""}
        if chance.random() < 0.5:
            members["rules"] = [{"variation": 2, "clauses": [clause]}]
        if chance.random() < 0.3:
            members["prerequisites"] = [{"key": chance.choice(KEYS), "variation": 0}]
        visible = chance.random() < 0.8
        availability = {"usingEnvironmentId": visible, "usingMobileKey": visible}
        text = json.dumps(
            data.flag(key, self._version, clientSideAvailability=availability, **members)
        )
        return parse(Kind.FLAG, key, text.encode())

    def _segment(self, key: str) -> Item:
        self._version += 1
        included = self._chance.sample(USERS, self._chance.randint(0, 2))
        text = json.dumps(data.segment(key, self._version, included=included, salt=""))
        return parse(Kind.SEGMENT, key, text.encode())

    @property
    def keeps_nobody_waiting(self) -> bool:
        channels = self.hub._channels.values()
        return not any(each._ahead for each in channels if isinstance(each, EvaluatingChannel))

    async def results(self, about: EvalClient) -> dict:
        """All results for a client."""
        program = await self.programs.ready(about.sdk_kind)
        assert program is not None
        return json.loads(program.all(about.context, with_reasons=about.with_reasons))


class SDK:
    """One client of the stream."""

    def __init__(self, site: Site, user: str, sdk_kind: SDKKind, *, with_reasons: bool) -> None:
        self._site = site
        self._json = json.dumps({"kind": "user", "key": user}).encode()
        self._about = parse_context(self._json), sdk_kind
        self._with_reasons = with_reasons
        self._transport: Buffer | None = None
        self._taken = 0
        self.basis = ""
        self.flags: dict[str, dict] = {}

    def about(self) -> EvalClient:
        reasons = self._with_reasons
        return EvalClient(self._json, *self._about, with_reasons=reasons, basis=self.basis)

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    def connect(self) -> None:
        self.cut()
        self._transport, self._taken = Buffer(), 0
        name = EVALUATING_FDV2[self._about[1]]
        self._site.hub.subscribe(name, self._transport, client=self.about())

    def cut(self) -> None:
        """Lose the connection, with all that was not read."""
        if self._transport is not None and not self._transport.closed:
            self._transport.abort()
        self._transport = None

    def read(self, limit: int = 1 << 30) -> None:
        """Read some bytes, and take the transfers that are complete."""
        if self._transport is None:
            return
        self._transport.read(limit)
        events = sse.Decoder().feed(_body(self._transport.received))
        ends = [n for n, e in enumerate(events) if _ends(e)]
        begin = 0
        for number, end in enumerate(ends):
            if number >= self._taken:
                self._take(events[begin : end + 1])
            begin = end + 1
        self._taken = len(ends)

    def _take(self, events: list[sse.Event]) -> None:
        intent, *rest = events
        (payload,) = json.loads(intent.data)["payloads"]
        if payload["intentCode"] == "none":
            assert rest == []
            assert self.basis
            return
        if payload["intentCode"] == "xfer-full":
            self.flags = {}
        for event in rest[:-1]:
            item = json.loads(event.data)
            if event.name == "delete-object":
                self.flags.pop(item["key"], None)
            else:
                del item["object"]["flagVersion"]
                self.flags[item["key"]] = item["object"]
        self.basis = json.loads(rest[-1].data)["state"]


def _ends(event: sse.Event) -> bool:
    return event.name == "payload-transferred" or b'"intentCode":"none"' in event.data


def _body(chunks: bytes) -> bytes:
    """The data of chunks, the last of which may be incomplete."""
    parts, at = [], 0
    while (line := chunks.find(b"\r\n", at)) >= 0:
        size = int(chunks[at:line], 16)
        parts.append(chunks[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(parts)


async def step(site: Site, sdks: list[SDK], chance: random.Random) -> None:
    """Let something happen, and then the loop turn a few times."""
    sdk, what = chance.choice(sdks), chance.random()
    if chance.random() < 0.1:
        site.save()
    if what < 0.45:
        site.change()
    elif what < 0.6:
        sdk.connect()
    elif what < 0.72:
        sdk.read(chance.randint(1, 3000))
        if what < 0.68:
            sdk.cut()
        elif site.payload is not None:
            for each in sdks:
                each.cut()
            site.restart()
    else:
        sdk.read(chance.randint(1, 3000))
    await turns(chance.choice([0, 1, 3, 10]))


@pytest.mark.parametrize("limit", [None, 2500])
@pytest.mark.parametrize("seed", SEEDS)
async def test_clients_end_with_all_their_results(
    seed: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
):
    """However often they are cut, whatever they had, and however slowly they read.

    With a limit large data have to be admitted.
    """
    with nullcontext() if limit is None else small_sizes(interval=0):
        await live(seed, limit, monkeypatch)


async def live(seed: int, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    if chance.random() < 0.5:
        monkeypatch.setattr(evaluated, "MANY_FLAGS", 4)
    monkeypatch.setattr(evaluated, "MAX_WAIT", 0.01)
    site = Site(chance, limit)
    sdks = [
        SDK(site, user, kind, with_reasons=bool(n % 2))
        for n, user in enumerate(USERS)
        for kind in EVALUATING_FDV2
    ]
    for _ in range(STEPS):
        await step(site, sdks, chance)
    site.change()
    for sdk in sdks:
        if not sdk.is_connected or chance.random() < 0.5:
            sdk.connect()
    await turns(200)
    await until(lambda: site.keeps_nobody_waiting)  # for data that were lost with a process
    # Who has read slowly is started over; who waits for admission gets everything after others.
    for _ in range(2 if limit is None else len(sdks) + 2):
        await turns(200)
        for sdk in sdks:
            sdk.read()
    for sdk in sdks:
        assert sdk.flags == await site.results(sdk.about())
        sdk.cut()
