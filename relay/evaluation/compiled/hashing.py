"""The SHA-1 digests that decide percentages, as functions of a subject (evaluation 6.9)."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha1

from relay.evaluation.bucketing import text_of
from relay.evaluation.compiled.context import EvalContext, Uncompilable
from relay.evaluation.compiled.thresholds import NOTHING
from relay.model.context import DEFAULT_KIND, Reference, lookup, parse_reference

Hashing = Callable[[EvalContext], bytes | None]
"""Gives a digest to compare with a threshold; None if the subject lacks the context kind."""


def of_keys_alone(
    kind: str, by: str | None, prefix: str, *, experiment: bool
) -> tuple[str, bytes] | None:
    """Return of which kind `EvalContext.suffixes` is hashed, and what before it.

    The arguments are those of `hashing`. None if other things are hashed than these.
    """
    if experiment or (by and by != "key"):
        return None
    return kind or DEFAULT_KIND, f"{prefix}.".encode()


def hashing(kind: str, by: str | None, prefix: str, *, experiment: bool) -> Hashing:
    """Return the digests of subjects.

    Args:
        kind: of the individual that counts; empty for `user`.
        by: the attribute that is hashed, as the flag or segment names it.
        prefix: what is hashed before it.
        experiment: these hash the key, and nothing else of the individual.

    Raises:
        Uncompilable: `by` is no valid reference.
    """
    usual = of_keys_alone(kind, by, prefix, experiment=experiment)
    if usual is not None:
        return _of_suffixes(*usual)
    start = f"{prefix}.".encode()
    kind_of_key = kind or DEFAULT_KIND
    if experiment:
        return _of_keys(kind_of_key, start)
    path = parse_reference(by or "", literal=not kind)
    if path is None:
        raise Uncompilable
    return _of_attribute(kind_of_key, path, start)


def _of_keys(kind: str, start: bytes) -> Hashing:
    def digest(subject: EvalContext) -> bytes | None:
        key = subject.keys.get(kind)
        return None if key is None else sha1(start + key, usedforsecurity=False).digest()

    return digest


def _of_suffixes(kind: str, start: bytes) -> Hashing:
    def digest(subject: EvalContext) -> bytes | None:
        suffix = subject.suffixes.get(kind)
        return None if suffix is None else sha1(start + suffix, usedforsecurity=False).digest()

    return digest


def _of_attribute(kind: str, path: Reference, start: bytes) -> Hashing:
    def digest(subject: EvalContext) -> bytes | None:
        individual = subject.individuals.get(kind)
        if individual is None:
            return None
        text = text_of(lookup(individual, path))
        if text is None:
            return NOTHING
        if individual.secondary is not None:
            text = f"{text}.{individual.secondary}"
        return sha1(start + text.encode(), usedforsecurity=False).digest()

    return digest
