"""SHA-1 digests that decide percentages, as functions of a context (evaluation 6.9)."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha1

from relay.evaluation.bucketing import hash_text
from relay.evaluation.compiled.context import EvalContext, Uncompilable
from relay.evaluation.compiled.thresholds import NOTHING
from relay.model.context import DEFAULT_KIND, Reference, lookup, parse_reference

Hashing = Callable[[EvalContext], bytes | None]
"""Returns a digest to compare with a threshold; None if the context lacks the kind."""


def suffix_hash_of(
    kind: str, by: str | None, prefix: str, *, experiment: bool
) -> tuple[str, bytes] | None:
    """Return the kind whose `EvalContext.suffixes` entry is hashed, and the prefix before it.

    None if anything else is hashed. The arguments are those of `hashing`.
    """
    if experiment or (by and by != "key"):
        return None
    return kind or DEFAULT_KIND, f"{prefix}.".encode()


def hashing(kind: str, by: str | None, prefix: str, *, experiment: bool) -> Hashing:
    """Return the function that hashes a context.

    Args:
        kind: kind of the individual to hash; empty for `user`.
        by: reference to the attribute to hash, as in the flag or segment.
        prefix: text hashed before it.
        experiment: hash only the key, whatever `by` says.

    Raises:
        Uncompilable: `by` is not a valid reference.
    """
    suffix_hash = suffix_hash_of(kind, by, prefix, experiment=experiment)
    if suffix_hash is not None:
        return _suffix_hashing(*suffix_hash)
    start = f"{prefix}.".encode()
    hashed_kind = kind or DEFAULT_KIND
    if experiment:
        return _key_hashing(hashed_kind, start)
    path = parse_reference(by or "", literal=not kind)
    if path is None:
        raise Uncompilable
    return _attribute_hashing(hashed_kind, path, start)


def _key_hashing(kind: str, start: bytes) -> Hashing:
    def digest(context: EvalContext) -> bytes | None:
        key = context.keys.get(kind)
        return None if key is None else sha1(start + key, usedforsecurity=False).digest()

    return digest


def _suffix_hashing(kind: str, start: bytes) -> Hashing:
    def digest(context: EvalContext) -> bytes | None:
        suffix = context.suffixes.get(kind)
        return None if suffix is None else sha1(start + suffix, usedforsecurity=False).digest()

    return digest


def _attribute_hashing(kind: str, path: Reference, start: bytes) -> Hashing:
    def digest(context: EvalContext) -> bytes | None:
        individual = context.individuals.get(kind)
        if individual is None:
            return None
        text = hash_text(lookup(individual, path))
        if text is None:
            return NOTHING
        if individual.secondary is not None:
            text = f"{text}.{individual.secondary}"
        return sha1(start + text.encode(), usedforsecurity=False).digest()

    return digest
