"""The protocol of a fleet in histories that are drawn: stops, cuts, crashes, failovers, clocks.

The program's code is unchanged; the network, upstream, time and chance are the world's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from relay.errors import StoreUnavailable
from relay.fleet import divided, feed, lease, source, upstream
from relay.fleet.doubts import Doubts
from relay.fleet.feed import Feed, Outcome
from relay.fleet.mirror import Base, FleetMirror
from relay.fleet.upstream import Upstream
from relay.protocol import feed as protocol
from relay.protocol.feed import Head, entry_of
from tests.fleet.world import UpstreamSource, World

# A history takes 90 ms of a core, so these take half a minute. `make nightly` has 100,000.
HISTORIES = int(os.environ.get("HISTORIES", "350"))
PER_TEST = max(25, HISTORIES // 100)
DIVIDED = HISTORIES // 3
"""As many in a cluster besides."""

ENOUGH = 100
"""Histories within which each planted bug must be found."""


def findings(seed: int, upstream: str = "", *, in_cluster: bool = False) -> list[str]:
    try:
        return World(seed, upstream, divided=in_cluster).run()
    except AssertionError as e:
        return [str(e)]


@pytest.mark.parametrize("first", range(0, HISTORIES, PER_TEST))
def test_no_history_breaks_the_fleet(first: int) -> None:
    """Whatever happens, nobody goes back, the feed is a chain, and all are current at the end."""
    for seed in range(first, first + PER_TEST):
        assert not findings(seed), f"seed {seed}"


@pytest.mark.parametrize("first", range(0, DIVIDED, PER_TEST))
def test_no_history_breaks_a_fleet_over_a_cluster(first: int) -> None:
    """Each server fails by itself; what SDKs read never goes back, and is current at the end."""
    for seed in range(first, min(first + PER_TEST, DIVIDED)):
        assert not findings(seed, in_cluster=True), f"seed {seed}"


def no_head_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication looks at the term only."""
    monkeypatch.setattr(feed, "guarded", lambda keys: (keys.term,))
    refused = feed.refused

    def refused_by_term(*arguments: Any) -> Outcome | None:
        outcome = refused(*arguments)
        return None if outcome is Outcome.MOVED else outcome

    monkeypatch.setattr(feed, "refused", refused_by_term)


def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication looks at nothing."""
    monkeypatch.setattr(feed, "guarded", lambda keys: ("p:nothing",))
    monkeypatch.setattr(feed, "refused", lambda *_: None)


def no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower applies whatever comes."""
    monkeypatch.setattr(source, "followed", lambda mine, entry: mine.with_items(entry.items or ()))


def older_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower takes what the feed has, though it has newer data itself."""
    monkeypatch.setattr(source, "is_at_least_as_new", lambda *_: True)


def deadline_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease counts from the answer, not from before the command."""
    monkeypatch.setattr(lease, "lease_end", lambda _, answered, seconds: answered + seconds)


def no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader believes in its lease until it is told that it has lost it."""
    monkeypatch.setattr(lease, "lease_end", lambda *_: 1e9)


def failed_renewal_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader takes a renewal that gets no answer for a success."""
    renew = Feed.renew

    async def renewed(own: Feed, all_keys: Any, *arguments: Any) -> list[bool]:
        with suppress(StoreUnavailable):
            await renew(own, all_keys, *arguments)
        return [True] * len(all_keys)

    monkeypatch.setattr(Feed, "renew", renewed)


def upstream_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower stays connected to upstream."""
    monkeypatch.setattr(Upstream, "leave", lambda _: None)


def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that SDKs read in other slots are written without a look at who leads."""

    async def prove(*_: Any) -> None:
        return None

    monkeypatch.setattr(Feed, "prove", prove)


def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that SDKs read in other slots are written though others have written them since."""
    monkeypatch.setattr(divided, "watch", lambda _: ("WATCH", "p:nothing"))


BUGS = [
    no_head_guard,
    no_guard,
    no_chain,
    older_data,
    deadline_of_the_answer,
    no_deadline,
    failed_renewal_ignored,
    upstream_kept,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_each_planted_bug_is_found(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """The histories would show if a rule of the protocol were missing."""
    bug(monkeypatch)
    assert any(findings(seed, "fdv1") for seed in range(ENOUGH)), bug.__doc__


def name_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry has the name of the data before it."""
    due = FleetMirror._due

    async def named(self: FleetMirror, *arguments: Any) -> Any:
        base = self._base or Base()
        publication, after = await due(self, *arguments)
        if publication is not None and publication.entry.items:
            publication = replace(publication, entry=replace(publication.entry, name=base.name))
        return publication, after

    monkeypatch.setattr(FleetMirror, "_due", named)


def name_of_doubted_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data keep upstream's name though some items are not those that it has sent."""
    resolve = Doubts.resolve

    def resolved(doubts: Doubts, *arguments: Any) -> Any:
        answer = resolve(doubts, *arguments)
        doubts.forget()
        return answer

    monkeypatch.setattr(Doubts, "resolve", resolved)


def name_of_merged_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that takes newer items from the feed takes the name of the feed's data, too."""
    monkeypatch.setattr(source, "has_equal_items", lambda *_: True)


def names_without_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees by names that an answer is older, or versions of items may go back."""
    for module in (source, upstream):
        monkeypatch.setattr(module, "distance", lambda *_: None)


def changes_of_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader applies changes whatever data they were made for."""
    monkeypatch.setattr(Upstream, "_later", lambda _, changes, __: replace(changes, since=""))


def forgotten_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed does not tell the names."""
    monkeypatch.setattr(protocol, "_plain", lambda _: None)
    monkeypatch.setattr(feed, "entry_of", lambda fields: replace(entry_of(fields), name=None))


def name_of_another_publication(monkeypatch: pytest.MonkeyPatch) -> None:
    """The note beside the head counts, whoever has written the head."""
    name_of = feed.name_of

    def named(note: bytes, head: Head | None) -> Any:
        noted = msgspec.msgpack.decode(note) if note else None
        return name_of(note, head and Head(noted[0], noted[1], head.identity)) if noted else None

    monkeypatch.setattr(feed, "name_of", named)


BUGS_OF_NAMES = [
    (name_of_before, "numbered"),
    (name_of_doubted_data, "addressed"),
    (name_of_merged_data, "addressed"),
    (names_without_order, "numbered"),
    (changes_of_other_data, "addressed"),
    (forgotten_names, "numbered"),
    (name_of_another_publication, "mixed"),
]


@pytest.mark.parametrize(
    ("bug", "kind"), BUGS_OF_NAMES, ids=[bug.__name__ for bug, _ in BUGS_OF_NAMES]
)
def test_each_wrong_name_is_found(bug, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member with a wrong basis would keep wrong data for good, so the histories show it."""
    bug(monkeypatch)
    assert any(findings(seed, kind) for seed in range(ENOUGH)), bug.__doc__


@pytest.mark.parametrize("bug", [unproved, unwatched], ids=lambda bug: bug.__name__)
def test_each_planted_bug_of_a_cluster_is_found(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """The histories would show if a part of the rule for other slots were missing."""
    bug(monkeypatch)
    assert any(findings(seed, "fdv1", in_cluster=True) for seed in range(ENOUGH)), bug.__doc__


@pytest.mark.parametrize("seed", range(5))
def test_a_new_key_takes_over_upstream(seed: int) -> None:
    """Whoever leads follows the new stream, and leaves the former one when it has delivered."""
    world = World(seed)
    renewed: list[UpstreamSource] = []

    def renew() -> None:
        for node in world.nodes:
            node.upstream = node.new_upstream()
            renewed.append(node.upstream)
            node.process.context.run(node.source.change_upstream, node.upstream)

    world.loop.after(20.5, renew)
    assert not world.run()
    assert [source for source in renewed if source.has_delivered]


def test_a_seed_replays() -> None:
    """A seed gives the same history each time."""
    worlds = []
    for _ in range(2):
        worlds.append(World(11))
        worlds[-1].run()
    first, second = worlds
    assert first.steps == second.steps > 1000
    assert first.redis.server.values.keys() == second.redis.server.values.keys()
    assert first.launchdarkly.states[-1].newest == second.launchdarkly.states[-1].newest
