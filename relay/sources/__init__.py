"""Where the data of an environment come from: the contract, and what sources yield.

`streaming`, `polling` and `file` are sources; nothing downstream knows which one it listens to.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from relay.errors import ErrorKind
from relay.model.payload import ChangeSet


@dataclass(frozen=True, slots=True)
class UpToDate:
    """The source works, and the data delivered so far are what upstream has now."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The source has lost upstream, or got nonsense from it, and goes on trying by itself.

    Args:
        kind: the class of failure, as `/status` names it.
        reason: a sentence for the log, without secrets.
        status: the HTTP status of the answer, if there was one.
        refused: upstream refuses the key; attempts are up to minutes apart.
    """

    kind: ErrorKind
    reason: str
    status: int | None = None
    refused: bool = False


Update = ChangeSet | UpToDate | Interrupted


class DataSource(Protocol):
    """Delivers one environment's data."""

    def updates(self) -> AsyncGenerator[Update, None]:
        """Yield all data as soon as possible, then changes, until cancelled.

        What goes wrong is yielded as `Interrupted` while the source keeps trying; a source raises
        only for defects of its own. Consume it under `contextlib.aclosing`.
        """

    def resync(self) -> None:
        """Ask upstream soon for all data once more, also if nothing seems to have changed."""

    def check(self, *, reconnect: bool = False) -> None:
        """See soon whether upstream has news: somebody says so, but its caches may lag behind.

        What comes of it is never older than what came before.

        Args:
            reconnect: the news should have come long ago.
        """
