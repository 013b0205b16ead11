"""Contract tests for data stores."""

from __future__ import annotations

from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish
from relay.stores import Version
from relay.stores.fingerprint import Fingerprint


def flag(key: str, version: int, json: bytes | None = b"") -> Item:
    """Return a flag, or a tombstone if `json` is None."""
    text = b'{"key":"%b","version":%d}' % (key.encode(), version) if json == b"" else json
    return Item(Kind.FLAG, key, version, text)


def segment(key: str, version: int) -> Item:
    return Item(Kind.SEGMENT, key, version, b'{"key":"%b","version":%d}' % (key.encode(), version))


class StoreContract:
    """Subclass it with a fixture `store` that is connected to an empty database."""

    async def test_a_new_store_holds_nothing(self, store):
        """Nothing is loaded, and there are no versions, until the store was initialised."""
        assert await store.load() is None
        assert await store.versions() is None

    async def test_written_items_are_loaded(self, store):
        """Items have the same bytes as before, and tombstones stay tombstones."""
        odd = flag("ü/<&> \u2028", 9, '{"version":9,"n":1e21,"m":-0,"text":"ü\u2028"}'.encode())
        items = [flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5), odd]
        await store.init(Payload.of(items))
        stored = await store.load()
        assert stored is not None
        assert set(stored.payload) == set(items)
        assert stored.invalid == ()

    async def test_an_empty_payload_initialises_too(self, store):
        """An environment without flags is initialised, too."""
        await store.init(Payload.of([]))
        stored = await store.load()
        assert stored is not None
        assert len(stored.payload) == 0

    async def test_init_replaces_everything(self, store):
        """Nothing of the earlier data is left, whatever its versions."""
        await store.init(Payload.of([flag("old", 9), flag("lamp", 9), segment("crowd", 9)]))
        await store.init(Payload.of([flag("lamp", 1)]))
        stored = await store.load()
        assert list(stored.payload) == [flag("lamp", 1)]

    async def test_upsert_goes_forward_only(self, store):
        """Only newer versions are written; tombstones count as versions."""
        await store.init(Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)]))
        equal = flag("lamp", 3, b'{"version":3,"other":true}')
        assert await store.upsert([equal, flag("gone", 4), segment("crowd", 4)])
        assert set((await store.load()).payload) == {
            flag("lamp", 3),
            flag("gone", 4, None),
            segment("crowd", 5),
        }
        newer = [flag("lamp", 4, None), flag("gone", 5), segment("crowd", 6), flag("new", 1)]
        assert await store.upsert(newer)
        assert set((await store.load()).payload) == set(newer)

    async def test_upsert_writes_nothing_to_a_store_without_marker(self, store):
        """A partial data set would be worse than none at all."""
        assert await store.upsert([flag("lamp", 1)]) is False
        assert await store.load() is None

    async def test_versions_tell_items_from_tombstones(self, store):
        """Every stored item is listed with its version."""
        big = 2**53 + 1
        items = [flag("lamp", 3), flag("gone", 4, None), segment("crowd", big)]
        await store.init(Payload.of(items))
        assert await store.versions() == {
            (Kind.FLAG, "lamp"): Version(3, live=True),
            (Kind.FLAG, "gone"): Version(4, live=False),
            (Kind.SEGMENT, "crowd"): Version(big, live=True),
        }

    async def test_a_probe_finds_the_fingerprint_of_the_same_content(self, store):
        """It holds after it was written, and no SDK reads it."""
        payload = Payload.of([flag("lamp", 3), segment("crowd", 5)])
        fingerprint = finish(Fingerprint.of(payload))
        await store.init(payload)
        assert not await store.holds(fingerprint)
        await store.mark(fingerprint)
        assert await store.holds(fingerprint)
        assert not await store.holds(finish(Fingerprint.of(Payload.of([flag("lamp", 4)]))))
        assert set((await store.load()).payload) == set(payload)
        assert len(await store.versions()) == 2

    async def test_a_probe_of_an_uninitialised_store_finds_nothing(self, store):
        """A fingerprint without the marker proves nothing."""
        fingerprint = finish(Fingerprint.of(Payload.of([])))
        assert not await store.holds(fingerprint)
        await store.mark(fingerprint)
        assert not await store.holds(fingerprint)
        assert await store.load() is None

    async def test_ordinary_items_can_be_held(self, store):
        assert store.problem_with(flag("lamp", 3)) is None
        assert store.problem_with(flag("lamp", 4, None)) is None
