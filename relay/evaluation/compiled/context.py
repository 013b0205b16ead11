"""The context in the form that compiled flags read, with common values computed once."""

from __future__ import annotations

from collections.abc import Mapping

from relay.evaluation.data import NO_MEMBERSHIPS, Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.model.context import DEFAULT_KIND, Context


class Uncompilable(Exception):
    """Only the interpreter can evaluate this; never leaves this package."""


class EvalContext:
    """A context during its evaluation, with its encoded keys.

    Args:
        context: to evaluate flags for.
        memberships: its big-segment memberships by context key.
    """

    __slots__ = (
        "consulted",
        "context",
        "individuals",
        "is_just_a_user",
        "keys",
        "memberships",
        "suffixes",
    )

    def __init__(
        self, context: Context, memberships: Mapping[str, Membership] = NO_MEMBERSHIPS
    ) -> None:
        self.memberships = memberships
        self.consulted: BigSegmentsStatus | None = None
        """Worst status of the big segments that the present flag has looked at."""
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

    def consult(self, status: BigSegmentsStatus) -> None:
        """Note that a big segment was looked at."""
        if status is not self.consulted:
            self.consulted = status.worse(self.consulted)


NOBODY = EvalContext(Context({}))
"""A context without individuals. No client sends it; it yields the usual value of each feature."""
