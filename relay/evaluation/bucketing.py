"""Percentages: the bucket of a context, and the variation that a bucket gets (evaluation 6.9).

The reference calculates in single precision. Every step here rounds like it, so that no context
changes sides.
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


def bucket(context: Context, kind: str, by: Reference | None, prefix: str, *, plain: bool) -> float:
    """Return where a context stands between 0 and 1; 0 if it lacks the kind or the attribute.

    Args:
        context: whose bucket it is.
        kind: of the individual that counts; empty for `user`.
        by: the attribute that is hashed; None for the key.
        prefix: what is hashed before it: the seed, or key and salt (see `salted`).
        plain: whether the secondary key of a legacy user is hashed, too; experiments ignore it.
    """
    individual = context.get(kind)
    if individual is None:
        return 0.0
    text = text_of(lookup(individual, by or _KEY))
    if text is None:
        return 0.0
    if plain and individual.secondary is not None:
        text = f"{text}.{individual.secondary}"
    digest = sha1(f"{prefix}.{text}".encode(), usedforsecurity=False).hexdigest()
    return single_of_int(int(digest[:_HASH_DIGITS], 16)) / (1 << _HASH_BITS)


def salted(key: str, salt: str, seed: Number | None = None) -> str:
    """Return the prefix of what is hashed."""
    return f"{key}.{salt}" if seed is None else str(int(seed))


def choose(position: float, variations: Sequence[WeightedVariation]) -> tuple[int, bool]:
    """Return the index of the weighted variation that a bucket gets.

    The second value tells whether its share reached that far; if none does, the last gets it.
    """
    reached = 0.0
    for index, each in enumerate(variations):
        reached = single(reached + share(each.weight))
        if position < reached:
            return index, True
    return len(variations) - 1, False


def share(weight: Number) -> float:
    """Return a weight as a part of 1."""
    return single(single_of_int(int(weight)) / HUNDRED_PERCENT)


def single(value: float) -> float:
    """Round to single precision."""
    rounded: float
    (rounded,) = _SINGLE.unpack(_SINGLE.pack(value))
    return rounded


def single_of_int(value: int) -> float:
    """Round an integer to single precision, at once: by way of a double it would be rounded twice.

    What no 64 bits can hold counts as the largest integer that they can.
    """
    size = min(abs(value), _MAX_INT)
    excess = size.bit_length() - _PRECISION
    if excess > 0:
        half = 1 << (excess - 1)
        kept, rest = size >> excess, size & (2 * half - 1)
        if rest > half or (rest == half and kept % 2):
            kept += 1
        size = kept << excess
    return float(-size if value < 0 else size)


def text_of(value: Any) -> str | None:
    """Return what is hashed of an attribute: strings and whole numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    whole = int(value)
    return str(whole) if whole == value and abs(whole) <= _MAX_INT else None
