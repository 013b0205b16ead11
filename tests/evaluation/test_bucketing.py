"""Buckets: single precision to the last bit, and the hashed text."""

import json
import struct
from fractions import Fraction
from hashlib import sha1

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.evaluation.bucketing import bucket, choose, hash_prefix, int_to_float32, share
from relay.model.context import Context, parse_context
from relay.model.flag import WeightedVariation


def context_of(**attributes: object) -> Context:
    """A user."""
    return parse_context(json.dumps({"kind": "user", "key": "anna", **attributes}).encode())


def hashed(text: str) -> float:
    """The bucket of a text."""
    return int_to_float32(int(sha1(text.encode()).hexdigest()[:15], 16)) / 2**60


def bits(value: float) -> int:
    """The bits of a number in single precision; the conversion must be exact."""
    packed = struct.pack("<f", value)
    assert struct.unpack("<f", packed) == (value,)
    return struct.unpack("<I", packed)[0]


@given(st.integers(0, 2**60 - 1) | st.integers(0, 2**36).map(lambda odd: (2**24 - 1 << 36) | odd))
def test_integers_round_once_to_the_nearest(value):
    """The rounded integer is the nearest of single precision; between two, the even one."""
    rounded = int_to_float32(value)
    here = bits(rounded)
    for neighbour in (here - 1, here + 1):
        if neighbour < 0:
            continue
        (other,) = struct.unpack("<f", struct.pack("<I", neighbour))
        distance, other_distance = abs(Fraction(rounded) - value), abs(Fraction(other) - value)
        assert distance < other_distance or (distance == other_distance and here % 2 == 0)


def test_integers_do_not_round_twice():
    """A little more than a tie is rounded up; through a double it would be a tie, and be rounded down."""
    value = (2**24 + 1 << 35) + 1
    assert int_to_float32(value) == 2**59 + 2**36
    assert struct.unpack("<f", struct.pack("<f", float(value))) == (2**59,)


@pytest.mark.parametrize("weight", [10**400, -(10**400), 2**63])
def test_weights_beyond_all_measure_do_no_harm(weight):
    """Numbers beyond 64 bits are clamped to the largest signed one."""
    assert abs(share(weight)) == share(2**63 - 1)


@pytest.mark.parametrize(
    ("by", "text"),
    [
        (None, "f.s.anna"),
        (("key",), "f.s.anna"),
        (("n",), "f.s.7"),
        (("f",), "f.s.7"),
        (("deep", "er"), "f.s.x"),
    ],
)
def test_what_is_hashed(by, text):
    """Key of the flag, salt and the attribute; whole numbers without a fraction."""
    context = context_of(n=7, f=7.0, deep={"er": "x"})
    assert bucket(context, "", by, hash_prefix("f", "s"), include_secondary=True) == hashed(text)


def test_a_seed_stands_for_key_and_salt():
    """A seed replaces key and salt, without a fraction."""
    assert bucket(
        context_of(), "user", None, hash_prefix("f", "s", 61.0), include_secondary=True
    ) == hashed("61.anna")


def test_the_secondary_key_counts_in_plain_rollouts():
    """A legacy user's secondary key is hashed, too, but not in experiments."""
    context = parse_context(b'{"key":"anna","secondary":"two"}')
    assert bucket(context, "", None, "p", include_secondary=True) == hashed("p.anna.two")
    assert bucket(context, "", None, "p", include_secondary=False) == hashed("p.anna")


@pytest.mark.parametrize("value", [True, 1.5, [1], {"a": 1}, 10**30, None])
def test_values_that_cannot_be_hashed_stand_at_zero(value):
    """Only texts and whole numbers of 64 bits have a bucket."""
    assert bucket(context_of(x=value), "", ("x",), "p", include_secondary=True) == 0


def test_a_context_without_the_kind_stands_at_zero():
    """Without an individual of the kind, there is nothing to hash."""
    assert bucket(context_of(), "org", None, "p", include_secondary=True) == 0


@pytest.mark.parametrize(
    ("position", "weights", "chosen"),
    [
        (0.0, [0, 1, 99_999], (1, True)),
        (0.5, [50_000, 50_000], (1, True)),
        (0.4999, [50_000, 50_000], (0, True)),
        (0.9, [10_000, 20_000], (1, False)),
        (0.1, [-5, 20_000], (1, True)),
    ],
)
def test_shares_add_up(position, weights, chosen):
    """The first share that reaches beyond the bucket is chosen; if none does, the last."""
    assert choose(position, [WeightedVariation(weight=weight) for weight in weights]) == chosen


def test_shares_add_up_in_single_precision():
    """Ten tenths are a little more than 1 in single precision, and a little less in double."""
    tenths = [WeightedVariation(weight=10_000)] * 10
    assert choose(1.0, tenths) == (9, True)
