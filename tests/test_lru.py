"""A bounded memory of keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.lru import LRUMap


def test_the_key_used_least_recently_is_forgotten():
    """Reading and writing are uses; a test of membership is none."""
    lru: LRUMap[str, int] = LRUMap(3)
    for number, key in enumerate("abc"):
        lru.put(key, number)
    assert lru.get("a") == 0
    assert "b" in lru
    lru.put("d", 3)
    assert list(lru) == ["c", "a", "d"]
    lru.put("c", 4)
    lru.put("e", 5)
    assert list(lru) == ["d", "c", "e"]
    assert (lru.get("c"), lru.get("b")) == (4, None)


def test_keys_can_be_forgotten():
    """One, or all."""
    lru: LRUMap[str, None] = LRUMap(3)
    for key in "abc":
        lru.put(key, None)
    lru.forget("b")
    lru.forget("x")
    assert list(lru) == ["a", "c"]
    lru.clear()
    assert (len(lru), "a" in lru, repr(lru)) == (0, False, "<LRUMap: 0 of 3 keys>")


@given(st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 9))), st.integers(1, 8))
def test_it_knows_the_latest_keys_and_no_others(uses, limit):
    """Whatever is read and written, in any order."""
    lru: LRUMap[int, int] = LRUMap(limit)
    expected: list[int] = []
    for use, key in uses:
        if use == "put":
            lru.put(key, -key)
        elif lru.get(key) is None:
            assert key not in expected
            continue
        expected = [*(k for k in expected if k != key), key][-limit:]
    assert list(lru) == expected
    assert all(lru.get(key) == -key for key in expected)
