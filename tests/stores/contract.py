"""What every data store promises; `stores` in conftest.py gives each in turn."""

from __future__ import annotations

from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores import Version


def flag(key: str, version: int, json: bytes | None = b"") -> Item:
    """A flag, or a tombstone if `json` is None."""
    text = b'{"key":"%b","version":%d}' % (key.encode(), version) if json == b"" else json
    return Item(Kind.FLAG, key, version, text)


def segment(key: str, version: int) -> Item:
    return Item(Kind.SEGMENT, key, version, b'{"key":"%b","version":%d}' % (key.encode(), version))


class StoreContract:
    """Tests of a store that a fixture `store` makes: empty, and connected to an empty database."""

    async def test_a_new_store_holds_nothing(self, store):
        """Nothing is loaded, and there are no versions, until the store was initialised."""
        assert await store.load() is None
        assert await store.versions() is None

    async def test_what_is_written_is_loaded(self, store):
        """Items come back in the same bytes, tombstones as tombstones."""
        odd = flag("ü/<&> \u2028", 9, '{"version":9,"n":1e21,"m":-0,"text":"ü\u2028"}'.encode())
        items = [flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5), odd]
        await store.init(Payload.of(items))
        stored = await store.load()
        assert stored is not None
        assert set(stored.payload) == set(items)
        assert stored.invalid == ()

    async def test_an_empty_payload_initialises_too(self, store):
        """An environment without flags is one that was initialised."""
        await store.init(Payload.of([]))
        stored = await store.load()
        assert stored is not None
        assert len(stored.payload) == 0

    async def test_init_replaces_everything(self, store):
        """Whatever the versions: nothing of before is left."""
        await store.init(Payload.of([flag("old", 9), flag("lamp", 9), segment("crowd", 9)]))
        await store.init(Payload.of([flag("lamp", 1)]))
        stored = await store.load()
        assert list(stored.payload) == [flag("lamp", 1)]

    async def test_upsert_goes_forward_only(self, store):
        """A newer version is written, an equal or older one is not; a tombstone counts as one."""
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
        """A partial data set would be worse than none."""
        assert await store.upsert([flag("lamp", 1)]) is False
        assert await store.load() is None

    async def test_versions_tell_items_from_tombstones(self, store):
        """Every stored item has its version."""
        big = 2**53 + 1
        items = [flag("lamp", 3), flag("gone", 4, None), segment("crowd", big)]
        await store.init(Payload.of(items))
        assert await store.versions() == {
            (Kind.FLAG, "lamp"): Version(3, live=True),
            (Kind.FLAG, "gone"): Version(4, live=False),
            (Kind.SEGMENT, "crowd"): Version(big, live=True),
        }
