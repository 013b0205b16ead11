"""Bucketing: map a context to a point in [0, 1] and that to a variation (evaluation 6.9).

ld-relay calculates in single precision. Every step here rounds the same way, so that no context
changes its variation.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha1
from typing import Any

from relay.model.context import Context, Reference, lookup
from relay.model.flag import Number, WeightedVariation

HUNDRED_PERCENT = 100_000.0
"""Weights are in thousandths of a percent."""

_KEY: Reference = ("key",)
_HASH_DIGITS = 15
_HASH_BITS = 4 * _HASH_DIGITS
_PRECISION = 24
_MAX_INT = 2**63 - 1
_SINGLE = struct.Struct("<f")


def bucket(
    context: Context, kind: str, by: Reference | None, prefix: str, *, include_secondary: bool
) -> float:
    """Return the bucket of a context, 0 to 1; 0 if it lacks the kind or the attribute.

    Args:
        context: the context to bucket.
        kind: kind of the individual to hash; empty for `user`.
        by: attribute to hash; None for the key.
        prefix: text hashed before the attribute (see `hash_prefix`).
        include_secondary: also hash the secondary key of a legacy user; experiments do not.
    """
    individual = context.get(kind)
    if individual is None:
        return 0.0
    text = hash_text(lookup(individual, by or _KEY))
    if text is None:
        return 0.0
    if include_secondary and individual.secondary is not None:
        text = f"{text}.{individual.secondary}"
    digest = sha1(f"{prefix}.{text}".encode(), usedforsecurity=False).hexdigest()
    return int_to_float32(int(digest[:_HASH_DIGITS], 16)) / (1 << _HASH_BITS)


def hash_prefix(key: str, salt: str, seed: Number | None = None) -> str:
    """Return the text hashed before the attribute: the seed if there is one, else key and salt."""
    return f"{key}.{salt}" if seed is None else str(int(seed))


def choose(position: float, variations: Sequence[WeightedVariation]) -> tuple[int, bool]:
    """Return the index of the weighted variation for a bucket, and whether its share covers it.

    If the shares end below the bucket, the last variation is chosen.
    """
    upper_bound = 0.0
    for index, weighted in enumerate(variations):
        upper_bound = to_float32(upper_bound + share(weighted.weight))
        if position < upper_bound:
            return index, True
    return len(variations) - 1, False


def share(weight: Number) -> float:
    """Return a weight as a fraction of 1."""
    return to_float32(int_to_float32(int(weight)) / HUNDRED_PERCENT)


def to_float32(value: float) -> float:
    """Round to single precision."""
    rounded: float
    (rounded,) = _SINGLE.unpack(_SINGLE.pack(value))
    return rounded


def int_to_float32(value: int) -> float:
    """Round an integer to single precision in one step; going through a double rounds twice.

    Values beyond 64 bits are clamped to the largest signed 64-bit integer.
    """
    size = min(abs(value), _MAX_INT)
    excess = size.bit_length() - _PRECISION
    if excess > 0:
        half = 1 << (excess - 1)
        significand, remainder = size >> excess, size & (2 * half - 1)
        if remainder > half or (remainder == half and significand % 2):
            significand += 1
        size = significand << excess
    return float(-size if value < 0 else size)


def hash_text(value: Any) -> str | None:
    """Return the text to hash for an attribute value; None unless a string or a whole number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    whole = int(value)
    return str(whole) if whole == value and abs(whole) <= _MAX_INT else None
