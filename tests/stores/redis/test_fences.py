"""Fences: one key in each slot, and scripts that leave alone what somebody later has written."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from relay.steps import finish
from relay.stores.redis.fences import Fences


@pytest.mark.parametrize("prefix", ["shop", "{}shop", "}shop{", "lädchen", ""])
def test_each_slot_has_one(prefix):
    """It is in the slot of the key that it is asked for, whatever the prefix."""
    fences = Fences(prefix)
    found = {}
    for number in range(200_000):
        key = f"key-{number}"
        slot = key_slot(key.encode())
        if slot not in found:
            found[slot] = fences.beside(key)
            assert key_slot(found[slot].encode()) == slot
            assert found[slot].startswith(f"{prefix}:$relay:fence:")
    assert len(found) == len(set(found.values())) > 16_380


def test_commands_of_a_slot_go_together():
    """In their order, and those of a key too."""
    commands = [("SADD", f"set-{n}", "a") for n in range(50)] + [("SREM", "set-7", "a")]
    scripts = finish(Fences("shop").writes(3, commands, mark=False))
    for script in scripts:
        count = int(script[2])
        assert len({key_slot(key.encode()) for key in script[3 : 3 + count]}) == 1
    assert sum(int(script[2]) - 1 for script in scripts) == 51
    [moved] = [script for script in scripts if "SREM" in script]
    assert moved.index("SADD") < moved.index("SREM")


@pytest.mark.parametrize("mark", [True, False])
def test_who_is_late_writes_nothing(cluster, mark):
    """A fence stops lower numbers, and stays as it is unless it is marked."""
    fences = Fences("shop")
    [write] = finish(fences.writes(5, [("SADD", "set", "a")], mark=mark))
    assert cluster.master_of("set").do(*write) == 1
    [late] = finish(fences.writes(4, [("SADD", "set", "late")], mark=True))
    assert cluster.master_of("set").do(*late) == (0 if mark else 1)
    [equal] = finish(fences.writes(5, [("SREM", "set", "a")], mark=False))
    assert cluster.master_of("set").do(*equal) == 1
    assert cluster.do("SMEMBERS", "set") == (set() if mark else {b"late"})


def test_a_value_moves_once(cluster):
    """From one that it has, or from none, and past the fence only."""
    fences = Fences("shop")

    def move(number, before, after, *, mark=False):
        script = fences.move(number, "cursor", before, after, mark=mark)
        return cluster.master_of("cursor").do(*script)

    assert move(1, "v1", "v2") == 0
    assert move(1, "", "v2") == 0
    assert move(1, None, "v1") == 1
    assert move(1, None, "v2") == 0
    assert move(2, "v1", None, mark=True) == 1
    assert move(1, "v1", "v2") == 0
    assert cluster.do("GET", "cursor") == b"v1"
    assert move(2, "v1", "") == 1
    assert move(2, None, "v3") == 0
    assert move(2, "", "v3") == 1
    assert cluster.do("GET", "cursor") == b"v3"
