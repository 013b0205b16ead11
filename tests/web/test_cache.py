"""The response cache: entries die with what they were made of, and take bounded memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest

from relay.environment import Environment
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.relay import Relay
from relay.web.cache import ANY_PAYLOAD, CacheEntry, ResponseCache
from tests.support.serving import Served


class Entry(CacheEntry, eq=False):
    """Entry with a value."""

    value: object = None


class Body:
    """Large part of a response."""


def new_payload() -> Payload:
    return Payload.of([Item(Kind.FLAG, "a", 1, b"{}")])


def served() -> tuple[Relay, Environment]:
    one = Served()
    one.environment.payload = new_payload()
    return one.relay, one.environment


def cache_of(relay: Relay, max_size: int = 1000) -> ResponseCache[Entry]:
    return ResponseCache(relay.registry, max_size)


def revoke(relay: Relay, environment: Environment) -> None:
    spec = environment.spec.without_credential(EnvironmentID("env-1"))
    relay.change(environment, spec)


def move_credential(relay: Relay, environment: Environment) -> None:
    other = Served(sdk_key=SDKKey("sdk-other"), environment_id=None).environment
    other.spec = replace(other.spec, name="other", environment_id=EnvironmentID("env-1"))
    relay.put(other)


CHANGES = {
    "environment removed": Relay.remove,
    "environment added": lambda relay, _: relay.put(
        Served(name="other", sdk_key=SDKKey("sdk-2"), environment_id=None).environment
    ),
    "credential revoked": revoke,
    "credential moved": move_credential,
    "spec replaced": lambda relay, e: relay.change(e, replace(e.spec, ttl=60.0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("depends_on_data", [True, False])
def test_an_entry_dies_with_its_environment_credential_and_spec(change, depends_on_data):
    """Any change of environments and credentials empties a cache."""
    relay, environment = served()
    cache = cache_of(relay)
    payload = environment.payload if depends_on_data else ANY_PAYLOAD
    entry = Entry(environment, payload, size=10)
    cache.put("key", entry)
    assert cache.get("key") is entry
    change(relay, environment)
    assert cache.get("key") is None
    assert (len(cache), cache.size) == (0, 0)
    cache.put("key", entry)
    assert cache.get("key") is entry


def test_an_expired_credential_empties_a_cache_before_any_timer():
    """Nothing is served with a key after the moment at which it expires."""
    now = 100.0
    relay, environment = served()
    registry = type(relay.registry)(lambda: now)
    registry.put(environment, environment.spec.with_credential(SDKKey("sdk-old"), 110.0))
    cache: ResponseCache[Entry] = ResponseCache(registry, 1000)
    cache.put("key", Entry(environment, ANY_PAYLOAD, size=10))
    now = 109.9
    assert cache.get("key") is not None
    now = 110.0
    assert cache.get("key") is None


def test_an_entry_dies_with_the_data_that_it_was_made_of():
    """New data make it stale, even if they are equal; entries that need no data stay."""
    relay, environment = served()
    cache = cache_of(relay)
    lasting = Entry(environment, ANY_PAYLOAD, size=10)
    cache.put("data", Entry(environment, environment.payload, size=10))
    cache.put("lasting", lasting)
    environment.payload = new_payload()
    assert cache.get("data") is None
    assert cache.get("lasting") is lasting
    assert cache.size == 10


def test_an_entry_made_without_data_dies_with_the_first_data():
    """A refusal for want of data is not served afterwards."""
    relay, environment = served()
    environment.payload = None
    cache = cache_of(relay)
    cache.put("key", Entry(environment, None, size=10))
    assert cache.get("key") is not None
    environment.payload = new_payload()
    assert cache.get("key") is None


def test_former_data_are_not_kept_alive():
    """Stale entries go when a first one of the new data comes, although nobody asks for them."""
    relay, environment = served()
    other = Served(name="other", sdk_key=SDKKey("sdk-2"), environment_id=None).environment
    other.payload = new_payload()
    relay.put(other)
    cache = cache_of(relay)
    body = Body()
    former = weakref.ref(body)
    cache.put("theirs", Entry(other, other.payload, size=10))
    for n in range(5):
        cache.put(n, Entry(environment, environment.payload, body, size=10))
    del body
    environment.payload = new_payload()
    assert former() is not None
    cache.put("new", Entry(environment, environment.payload, size=10))
    gc.collect()
    assert former() is None
    assert (len(cache), cache.size) == (2, 20)
    assert cache.get("theirs") is not None


def test_a_removed_environment_is_not_kept_alive():
    """The cache releases it at its next use."""
    relay, environment = served()
    other = Served(name="other", sdk_key=SDKKey("sdk-2"), environment_id=None).environment
    relay.put(other)
    cache = cache_of(relay)
    cache.put("key", Entry(other, other.payload, size=10))
    cache.put("mine", Entry(environment, environment.payload, size=10))
    gone = weakref.ref(other)
    relay.remove(other)
    del other
    assert cache.get("mine") is None
    gc.collect()
    assert gone() is None


def test_the_least_recently_used_are_evicted():
    """The sum of sizes is bounded; what is used stays."""
    relay, environment = served()
    cache = cache_of(relay, 100)
    for n in range(50):
        cache.put(n, Entry(environment, environment.payload, n, size=10))
        assert cache.size <= 100
        assert (entry := cache.get(0)) is not None
        assert entry.value == 0
    assert [n for n in range(50) if cache.get(n)] == [0, *range(41, 50)]
    cache.put("large", Entry(environment, environment.payload, size=95))
    assert (len(cache), cache.size) == (1, 95)
    cache.put("too large", Entry(environment, environment.payload, size=101))
    assert (len(cache), cache.size) == (0, 0)


def test_an_entry_replaces_that_of_an_equal_key():
    """Its size is counted once."""
    relay, environment = served()
    cache = cache_of(relay)
    for value in (1, 2):
        cache.put("key", Entry(environment, ANY_PAYLOAD, value, size=10 * value))
    assert (entry := cache.get("key")) is not None
    assert (entry.value, len(cache), cache.size) == (2, 1, 20)


def test_a_debugger_shows_sizes_instead_of_data():
    """Cache and entry state their sizes, the entry whether it is fresh."""
    relay, environment = served()
    cache, entry = cache_of(relay), Entry(environment, environment.payload, "secret", size=10)
    cache.put("key", entry)
    assert repr(cache) == "<ResponseCache [1 entries, 10 bytes]>"
    assert repr(entry) == "<Entry [fresh, 10 bytes]>"
    environment.payload = None
    assert repr(entry) == "<Entry [stale, 10 bytes]>"
