"""Contract tests for the members of big segments in a database."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from relay.protocol.bigsegments import Members, Patch, _Changes, context_hash
from relay.stores.bigsegments import Metadata

ANN, BEN, CLEO = map(context_hash, ("ann", "ben", "cleo"))


def patch(
    version: str,
    segment: str = "team.g2",
    include=(),
    exclude=(),
    *,
    no_longer=(),
    no_longer_excluded=(),
) -> Patch:
    included = Members(list(include), list(no_longer))
    excluded = Members(list(exclude), list(no_longer_excluded))
    return Patch(segment, version, "", _Changes(included, excluded))


class BigSegmentStoreContract:
    """Subclass it with a fixture `store` that is connected to an empty database."""

    many = 1000
    """Members of a patch that are far more than any limit of one request."""

    async def test_a_new_store_holds_nothing(self, store):
        """There is neither a version nor a time, and nobody is a member."""
        assert await store.metadata() == Metadata(None, None)
        assert await store.memberships([ANN, BEN]) == [{}, {}]

    async def test_members_come_and_go(self, store):
        """Patches add and remove; being included wins over being excluded."""
        assert await store.apply(patch("v1", include=[ANN, BEN], exclude=[CLEO]), None) is not None
        assert await store.apply(patch("v2", "org.g1", exclude=[ANN, BEN]), "v1") is not None
        assert await store.memberships([CLEO, ANN]) == [
            {"team.g2": False},
            {"team.g2": True, "org.g1": False},
        ]
        last = patch("v3", "org.g1", include=[ANN], no_longer_excluded=[BEN])
        assert await store.apply(last, "v2") is not None
        assert await store.memberships([ANN, BEN]) == [
            {"team.g2": True, "org.g1": True},
            {"team.g2": True},
        ]
        assert (await store.metadata()).cursor == "v3"

    async def test_two_sets_of_one_context_change_at_once(self, store):
        """A context is moved from one set to the other by a single patch."""
        await store.apply(patch("v1", exclude=[ANN]), None)
        assert await store.apply(patch("v2", include=[ANN], no_longer_excluded=[ANN]), "v1")
        assert await store.memberships([ANN]) == [{"team.g2": True}]
        assert await store.apply(patch("v3", no_longer=[ANN]), "v2")
        assert await store.memberships([ANN]) == [{}]

    async def test_only_the_next_patch_is_applied(self, store):
        """If the stored version is another one, nothing changes."""
        await store.apply(patch("v1", include=[ANN]), None)
        for cursor in (None, "", "v0", "v2"):
            assert await store.apply(patch("v9", include=[BEN]), cursor) is None
        assert (await store.metadata()).cursor == "v1"
        assert await store.memberships([BEN]) == [{}]

    async def test_versions_may_stay_and_be_empty(self, store):
        """Several patches may lead to one version, and the first versions may be empty."""
        assert await store.apply(patch("", include=[ANN]), None) is not None
        assert (await store.metadata()).cursor == ""
        assert await store.apply(patch("", include=[BEN]), "") is not None
        assert await store.memberships([ANN, BEN]) == [{"team.g2": True}] * 2

    async def test_a_patch_without_members_moves_the_version(self, store):
        """The version moves on, and nobody's membership has changed."""
        assert await store.apply(patch("v1"), None) == frozenset()
        assert (await store.metadata()).cursor == "v1"

    async def test_a_patch_of_many_members_is_applied_whole(self, store):
        """Far more members than any limit of one request."""
        many = [context_hash(str(number)) for number in range(self.many)]
        assert await store.apply(patch("v1", include=many), None) == frozenset(many)
        tenth = many[::10]
        assert await store.memberships(tenth) == [{"team.g2": True}] * len(tenth)

    async def test_one_of_several_writers_applies_a_patch(self, store, another_store):
        """Of two who apply the same patch at a time, one is told that it was not the one."""
        for number in range(20):
            before = f"v{number}" if number else None
            following = patch(f"v{number + 1}", include=[ANN] if number % 2 else [BEN])
            applied = await asyncio.gather(
                store.apply(following, before), another_store.apply(following, before)
            )
            assert applied.count(None) == 1

    async def test_the_time_of_the_synchronisation_is_kept(self, store):
        """It is kept in milliseconds, beside the version."""
        await store.mark_synchronized(1_700_000_000.1234)
        assert await store.metadata() == Metadata(None, 1_700_000_000.123)
        await store.apply(patch("v1"), None)
        assert await store.metadata() == Metadata("v1", 1_700_000_000.123)

    async def test_one_of_several_relays_has_the_lease(self, store, another_store):
        """Until it gives it up; it may claim it again, and cannot give up another's."""
        assert await store.claim("one")
        assert not await another_store.claim("two")
        assert await store.claim("one")
        await another_store.release("two")
        assert not await another_store.claim("two")
        await store.release("one")
        assert await another_store.claim("two")
        assert not await store.claim("one")

    async def test_one_of_those_who_claim_at_a_time_gets_the_lease(self, store, another_store):
        """However often they try."""
        for number in range(20):
            claims = await asyncio.gather(
                *(each.claim(f"{each is store}-{number}") for each in (store, another_store) * 3)
            )
            assert claims.count(True) >= 1
            assert len({n % 2 for n, claimed in enumerate(claims) if claimed}) == 1
            for each in (store, another_store):
                await each.release(f"{each is store}-{number}")

    @pytest.mark.timing
    async def test_a_lease_that_is_not_kept_ends(self, store, another_store, monkeypatch):
        """After its lifetime another relay gets it, and the first one has lost it."""
        assert store.lease_lifetime > 1.0
        monkeypatch.setattr(inspect.getmodule(type(store).claim), "LEASE", 0.5)
        assert await store.claim("one")
        start = asyncio.get_running_loop().time()
        while not await another_store.claim("two"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - start > 0.4
        assert not await store.claim("one")

    @pytest.mark.timing
    async def test_a_lease_that_is_kept_does_not_end(self, store, another_store, monkeypatch):
        """The others wait for as long as it is claimed again in time."""
        monkeypatch.setattr(inspect.getmodule(type(store).claim), "LEASE", 0.5)
        for _ in range(12):
            assert await store.claim("one")
            assert not await another_store.claim("two")
            await asyncio.sleep(0.1)
