"""The client that flags are evaluated for."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from relay.evaluation.data import NO_MEMBERSHIPS, Membership
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.text import to_base64

IDENTITY_SIZE = 12
"""Bytes of an identity: a client gains nothing by finding another context with its own."""


class EvalClient:
    """The context that flags are evaluated for; shared by streams with equal contexts.

    Args:
        json: of the context, as the client has sent it.
        context: parsed from it.
        sdk_kind: decides which flags are visible.
        with_reasons: True if the entries have reasons.
        basis: state of the data that the client has (fdv2 13.2.5); empty without one.
    """

    __slots__ = (
        "__weakref__",
        "basis",
        "context",
        "identity",
        "memberships",
        "sdk_kind",
        "with_reasons",
    )

    def __init__(
        self,
        json: bytes,
        context: Context,
        sdk_kind: SDKKind,
        *,
        with_reasons: bool = False,
        basis: str = "",
    ) -> None:
        self.context = context
        self.sdk_kind = sdk_kind
        self.with_reasons = with_reasons
        self.basis = basis
        self.memberships: Mapping[str, Membership] = NO_MEMBERSHIPS
        """Memberships in big segments, by context key, that the client has the results of."""
        purpose = b"%b %d" % (sdk_kind.value.encode(), with_reasons)
        digest = blake2b(json, digest_size=IDENTITY_SIZE, person=purpose).digest()
        self.identity = to_base64(digest)
        """Digest of all this, in base64url; the JSON itself is not kept."""

    def __repr__(self) -> str:
        return f"<EvalClient {self.identity}>"  # contexts are private
