"""A fleet: relays that share a Redis elect, for each environment, who listens to upstream.

The *leader* listens to upstream and publishes in Redis; the *followers* follow its feed; a member
without Redis is *alone* and listens to upstream itself. What makes it right is not the lease but a
comparison with the head of the feed in every publication: whoever writes must know what was written
last.

`feed` has the steps against Redis, `member` what a process does once for all environments, `source`
the roles of one environment, and `mirror` its publications. `divided` writes what SDKs read where a
cluster has it in other slots.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from relay.sources import DataSource

T = TypeVar("T")

Command = Sequence[str | bytes]


class Connection(Protocol):
    """A connection to Redis for exclusive use."""

    async def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one batch; return their replies. A refused command raises."""

    async def transaction(self, commands: Iterable[Command]) -> list[Any] | None:
        """Run commands as one transaction.

        Returns:
            The replies, errors among them; None if another writer has changed a watched key.
        """


class Database(Protocol):
    """Access to Redis, as fleets need it; `RedisClient` keeps it, and the simulation's server."""

    async def run(self, key: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Return the result of work with a connection; one that fails or is interrupted is closed.

        Closing discards its transaction, if that has not been executed.

        Args:
            key: a key; the work uses only keys of the same server, in a cluster of its slot.
            work: may be repeated from its beginning.

        Raises:
            StoreUnavailable: whether the last commands were executed is unknown.
        """

    def join(self, user: object) -> None:
        """Note that somebody uses the connections from now on."""

    async def leave(self, user: object) -> None:
        """Note that somebody needs the connections no more; the last one closes them."""


class Role(Enum):
    """Role of a member for one environment."""

    FOLLOWER = "follower"
    LEADER = "leader"
    ALONE = "alone"


class FleetStatus(Struct, frozen=True):
    """State of a member for one environment, as `/status` and metrics show it.

    Args:
        role: of the member.
        leader: name of the member that leads, as last seen; None if nobody does.
        term: number of this member's leadership; None unless it leads.
        publications: number of publications of the environment, as last seen.
        behind: publications that a follower has not taken yet.
        leaderless: seconds since which nobody is seen to lead; 0 if somebody does.
        changes_of_role: since the start.
        snapshots: number of times that all data were read.
        outcomes: numbers of this member's publications by outcome.
    """

    role: Role
    leader: str | None
    term: int | None
    publications: int
    behind: int
    leaderless: float
    changes_of_role: int
    snapshots: int
    outcomes: Mapping[str, int]


class Participant(Protocol):
    """Part that an environment takes in a fleet."""

    @property
    def status(self) -> FleetStatus:
        """State of this member for the environment."""

    def change_upstream(self, upstream: DataSource) -> None:
        """Follow another upstream from now on, as with a new SDK key.

        The former one is followed until this one has delivered all data.
        """


class FleetMember(Protocol):
    """This relay, as a member of a fleet."""

    async def run(self) -> None:
        """Take part until cancelled."""
