"""A context as compiled flags want it: what most of them need is worked out once."""

from __future__ import annotations

from relay.model.context import DEFAULT_KIND, Context


class Uncompilable(Exception):
    """Something that only the interpreter does; never leaves this package."""


class EvalContext:
    """A context while flags are evaluated for it."""

    __slots__ = ("context", "individuals", "is_just_a_user", "keys", "suffixes")

    def __init__(self, context: Context) -> None:
        individuals = context.individuals
        self.context = context
        self.individuals = individuals
        self.is_just_a_user = len(individuals) == 1 and DEFAULT_KIND in individuals
        self.keys = {kind: each.key.encode() for kind, each in individuals.items()}
        """The key of each individual, as it is hashed for experiments."""
        self.suffixes = self.keys
        """The same for rollouts, which take the secondary key of a legacy user in."""
        user = individuals.get(DEFAULT_KIND)
        if user is not None and user.secondary is not None:
            suffix = self.keys[DEFAULT_KIND] + b"." + user.secondary.encode()
            self.suffixes = {**self.keys, DEFAULT_KIND: suffix}


NOBODY = EvalContext(Context({}))
"""A context without individuals. Nobody asks for it, but flags have a result for it."""
