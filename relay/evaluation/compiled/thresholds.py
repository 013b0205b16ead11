"""Percentages of rollouts as bytes to which a SHA-1 digest is compared, exactly.

The definition takes the first 60 bits of the digest as an integer n, rounds n to a 32-bit float,
divides by 2^60 and compares with a 32-bit bound (evaluation 6.9). For each bound there is a least
integer for which that says "no longer below", and a digest is below the bound just when it sorts
before the bytes of that integer.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from math import ceil, floor

BITS = 60
"""Of the digest: 15 hexadecimal digits."""

NEVER = b""
ALWAYS = b"\xff" * 21
"""Longer than any digest, so greater than all."""

NOTHING = bytes(20)
"""Sorts like the digest of the bucket 0, which is where contexts without the attribute go."""

KNOWN_BOUNDS = 4096
"""Weights repeat (10 %, 50 %); no environment has as many different ones as this."""


@lru_cache(maxsize=KNOWN_BOUNDS)
def threshold(bound: float) -> bytes:
    """Return what sorts after just the digests whose bucket is below `bound`, a 32-bit float."""
    if bound <= 0:
        return NEVER
    if bound > 1:
        return ALWAYS
    return (_least_not_below(bound * 2.0**BITS) << 4).to_bytes(8, "big")


def _least_not_below(bound: float) -> int:
    """Return the least integer that rounds to at least `bound`.

    They begin at the middle between it and its predecessor; the middle itself belongs to that one
    of the two whose last bit is 0.
    """
    bits: int
    (bits,) = struct.unpack(">I", struct.pack(">f", bound))
    predecessor: float
    (predecessor,) = struct.unpack(">f", struct.pack(">I", bits - 1))
    middle = (predecessor + bound) / 2
    return ceil(middle) if bits % 2 == 0 else floor(middle) + 1
