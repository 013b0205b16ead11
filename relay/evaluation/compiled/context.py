"""The context in the form that compiled flags read, with common values computed once."""

from __future__ import annotations

from relay.model.context import DEFAULT_KIND, Context


class Uncompilable(Exception):
    """Only the interpreter can evaluate this; never leaves this package."""


class EvalContext:
    """A context during its evaluation, with its encoded keys."""

    __slots__ = ("context", "individuals", "is_just_a_user", "keys", "suffixes")

    def __init__(self, context: Context) -> None:
        individuals = context.individuals
        self.context = context
        self.individuals = individuals
        self.is_just_a_user = len(individuals) == 1 and DEFAULT_KIND in individuals
        self.keys = {kind: each.key.encode() for kind, each in individuals.items()}
        """Encoded key by kind, as hashed for experiments."""
        self.suffixes = self.keys
        """Encoded key by kind, as hashed for rollouts: with a legacy user's secondary key."""
        user = individuals.get(DEFAULT_KIND)
        if user is not None and user.secondary is not None:
            suffix = self.keys[DEFAULT_KIND] + b"." + user.secondary.encode()
            self.suffixes = {**self.keys, DEFAULT_KIND: suffix}


NOBODY = EvalContext(Context({}))
"""A context without individuals. No client sends it; it yields the usual value of each feature."""
