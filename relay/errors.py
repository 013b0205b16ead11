"""Exceptions of this package, ordered by cause and by whether the failure can pass by itself.

    RelayError
    ├── ConfigError            the operator's: wrong options; carries every problem
    ├── UnusableArchive        an archive's: not an archive, cut off, changed on its way
    ├── InvalidData            upstream's, a file's or a store's: unusable bytes
    ├── UpstreamUnavailable    passes by itself: network, 5xx, a broken stream
    │   └── UpstreamRefused    passes when the key is fixed: 401, 403 and the like
    └── StoreUnavailable       passes by itself: the database cannot be reached or will not write

Exceptions of libraries are translated once, where the library is called, and kept as the cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

RETRYABLE_4XX = frozenset({407, 408, 429})
"""4xx statuses that pass by themselves and do not refuse a key; 407 comes from a proxy."""


class ErrorKind(Enum):
    """Class of an upstream failure, named as in `/status` (streams 2.5)."""

    NETWORK_ERROR = "NETWORK_ERROR"
    ERROR_RESPONSE = "ERROR_RESPONSE"
    INVALID_DATA = "INVALID_DATA"
    STORE_ERROR = "STORE_ERROR"
    UNKNOWN = "UNKNOWN"


class RelayError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(RelayError):
    """The configuration is unusable.

    Args:
        problems: one sentence each, with its source (file and line, or variable).
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(", ".join(problems))
        self.problems = tuple(problems)


class InvalidData(RelayError):
    """Data cannot be decoded or is invalid.

    Args:
        what: subject of the error, such as `flag "lamp"` or `put message`.
        reason: description of the error, and its place.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what}: {reason}")
        self.what = what
        self.reason = reason


class UnusableArchive(RelayError):
    """An archive of environments cannot be used as a whole."""


class UpstreamUnavailable(RelayError):
    """A request to upstream failed; retrying may help.

    Args:
        kind: class of the failure, as named in `/status`.
        reason: a sentence without secrets.
        status: HTTP status of the response, if there was one.
        headers: of that response, by name in lower case.
    """

    def __init__(
        self,
        kind: ErrorKind,
        reason: str,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.status = status
        self.headers = headers or {}


class UpstreamRefused(UpstreamUnavailable):
    """Upstream refused the key (401, 403, 404 …): by mistake, or until the key is fixed."""


class StoreUnavailable(RelayError):
    """The database cannot be reached, or refuses a command."""
