"""Rollout percentages as bytes that compare exactly with a SHA-1 digest.

The specification takes the first 60 bits of the digest as an integer n, rounds n to a 32-bit float,
divides by 2^60 and compares with a 32-bit bound (evaluation 6.9). Every bound has a least integer
that is no longer below it, and a digest is below the bound exactly if it sorts before the bytes of
that integer.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from math import ceil, floor

BITS = 60
"""Leading bits of the digest that count: 15 hexadecimal digits."""

NEVER = b""
"""No digest sorts before it."""

ALWAYS = b"\xff" * 21
"""Longer than any digest, so every digest sorts before it."""

NOTHING = bytes(20)
"""Sorts like a digest of bucket 0, the bucket of contexts without the attribute."""

MAX_CACHED = 4096
"""Thresholds to cache. Weights repeat (10 %, 50 %); no environment has this many different ones."""


@lru_cache(maxsize=MAX_CACHED)
def threshold(bound: float) -> bytes:
    """Return bytes that a digest sorts before exactly if its bucket is below `bound` (32-bit)."""
    if bound <= 0:
        return NEVER
    if bound > 1:
        return ALWAYS
    return (_least_not_below(bound * 2.0**BITS) << 4).to_bytes(8, "big")


def _least_not_below(bound: float) -> int:
    """Return the least integer that rounds to at least `bound`.

    Those integers start at the midpoint between `bound` and its predecessor; the midpoint itself
    rounds to the one whose last bit is 0.
    """
    bits: int
    (bits,) = struct.unpack(">I", struct.pack(">f", bound))
    predecessor: float
    (predecessor,) = struct.unpack(">f", struct.pack(">I", bits - 1))
    midpoint = (predecessor + bound) / 2
    return ceil(midpoint) if bits % 2 == 0 else floor(midpoint) + 1
