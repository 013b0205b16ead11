"""Every exception of our own. What shapes the tree: can it pass by itself, and whose fault is it?

    RelayError
    ├── ConfigError            the operator's: wrong options; carries every problem
    ├── InvalidData            upstream's, a file's or a store's: unusable bytes
    ├── UpstreamUnavailable    passes by itself: network, 5xx, a broken stream
    │   └── UpstreamRefused    passes when somebody mends the key: 401, 403 and the like
    └── StoreUnavailable       passes by itself: the database cannot be reached or will not write

Libraries' exceptions are translated where the library is called, once, with the cause kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

RETRYABLE_4XX = frozenset({407, 408, 429})
"""4xx that pass by themselves and say nothing about a key; 407 comes from a proxy."""


class ErrorKind(Enum):
    """What went wrong upstream, in the words of `/status` (streams 2.5)."""

    NETWORK_ERROR = "NETWORK_ERROR"
    ERROR_RESPONSE = "ERROR_RESPONSE"
    INVALID_DATA = "INVALID_DATA"
    STORE_ERROR = "STORE_ERROR"
    UNKNOWN = "UNKNOWN"


class RelayError(Exception):
    """What all exceptions of this package have in common."""


class ConfigError(RelayError):
    """The configuration cannot be used.

    Args:
        problems: one sentence each, with its source (file and line, or variable).
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(", ".join(problems))
        self.problems = tuple(problems)


class InvalidData(RelayError):
    """Bytes do not hold what they should.

    Args:
        what: the thing that was read, such as `flag "lamp"` or `put message`.
        reason: what is wrong with it, and where.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what}: {reason}")
        self.what = what
        self.reason = reason


class UpstreamUnavailable(RelayError):
    """Upstream did not give what was asked for; trying again may help.

    Args:
        kind: the class of failure, as `/status` names it.
        reason: a sentence without secrets.
        status: the HTTP status, where there was an answer.
    """

    def __init__(self, kind: ErrorKind, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.status = status


class UpstreamRefused(UpstreamUnavailable):
    """Upstream refuses the key (401, 403, 404 …): by mistake, or until somebody mends it."""


class StoreUnavailable(RelayError):
    """The database cannot be reached, or refuses to do what it was asked."""
