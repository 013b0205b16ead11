"""A fleet: relays that share a Redis elect, for each environment, who listens to upstream.

The *leader* listens to upstream and publishes in Redis; the *followers* follow its feed; a member
without Redis is *alone* and listens to upstream itself. What makes it right is not the lease but a
comparison with the head of the feed in every publication: whoever writes must know what was written
last.

`feed` has the steps against Redis, `member` what a process does once for all environments, `source`
the roles of one environment, and `mirror` its publications.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Any, Protocol

Command = Sequence[str | bytes]


class Connection(Protocol):
    """A connection to Redis for exclusive use."""

    async def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one batch; return their replies. A refused command raises."""


class Database(Protocol):
    """Access to Redis, as fleets need it; `RedisClient` keeps it, and the simulation's server."""

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """Lend a connection; one that fails or is interrupted is closed.

        Closing discards its transaction, if that has not been executed. Failures are raised as
        `StoreUnavailable`: whether the last commands were executed is unknown then.
        """

    async def aclose(self) -> None:
        """Close all connections."""


class Role(Enum):
    """Role of a member for one environment."""

    FOLLOWER = "follower"
    LEADER = "leader"
    ALONE = "alone"
