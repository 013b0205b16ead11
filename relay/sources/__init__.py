"""Data sources: the contract, and the updates that sources yield.

`fdv2`, `streaming`, `polling` and `file` implement it; nothing downstream depends on which one is
used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from msgspec import Struct

from relay.errors import ErrorKind
from relay.model.payload import ChangeSet


class UpToDate(Struct, frozen=True):
    """The source works, and the data delivered so far is current.

    Args:
        since: state of the data that upstream has confirmed (fdv2 13.2.5), which need not have been
            delivered by this source; empty if upstream gives the data no name.
    """

    since: str = ""


class Interrupted(Struct, frozen=True):
    """The source has lost upstream, or received unusable data, and keeps retrying by itself.

    Args:
        kind: class of the failure, as named in `/status`.
        reason: a sentence for the log, without secrets.
        status: HTTP status of the response, if there was one.
        refused: True if upstream refused the key; retries are then up to minutes apart.
    """

    kind: ErrorKind
    reason: str
    status: int | None = None
    refused: bool = False


Update = ChangeSet | UpToDate | Interrupted


class DataSource(Protocol):
    """Delivers one environment's data."""

    @property
    def protocol(self) -> str:
        """Protocol by which upstream is followed, `fdv1` or `fdv2`; empty without upstream."""

    def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield all data as soon as possible, then changes, until cancelled.

        Failures are yielded as `Interrupted` while the source keeps retrying; only unexpected
        errors are raised. Consume the generator under `contextlib.aclosing`.

        Args:
            basis: name that upstream has given to the data that are there already; empty if there
                are none. A source that can continues from there, and its first change set, or
                `UpToDate`, has it as `since`; others yield all data.
        """

    def resync(self) -> None:
        """Request all data again soon, even if nothing seems to have changed."""

    def check(self, *, reconnect: bool = False) -> None:
        """Check upstream for changes soon.

        Called when a change was announced; upstream's caches may still lag behind. The result is
        never older than the data delivered before.

        Args:
            reconnect: the change is overdue; replace a connection that looks healthy, too.
        """
