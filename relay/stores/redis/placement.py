"""Contract for what knows which server has a key; and the simplest case, a single server."""

from __future__ import annotations

from typing import Protocol

from relay.errors import StoreUnavailable
from relay.stores.redis.connections import Address
from relay.stores.redis.refusals import reason_of


class Placement(Protocol):
    """Knows which server has the keys of a slot; everything is in slot 0 outside a cluster."""

    @property
    def is_cluster(self) -> bool:
        """True if keys are divided between servers by their slots."""

    async def address_of(self, slot: int) -> Address:
        """Return the server that has a slot.

        Raises:
            StoreUnavailable: nobody can tell.
        """

    async def redirected(self, error: Exception, address: Address) -> Address | None:
        """Return where to repeat what has failed at a server, which has not carried it out.

        Returns:
            The server that takes over the slot and has to be asked as such; None to begin again
            with `address_of`.

        Raises:
            StoreUnavailable: it must not be repeated.
        """

    async def aclose(self) -> None:
        """Close the connections of its own."""


class OneServer:
    """Everything is on one server.

    Args:
        address: of the server.
    """

    is_cluster = False

    def __init__(self, address: Address) -> None:
        self._address = address

    async def address_of(self, slot: int) -> Address:  # noqa: ARG002 - the contract's
        """Return the server."""
        return self._address

    async def redirected(
        self,
        error: Exception,
        address: Address,  # noqa: ARG002 - the contract's
    ) -> Address | None:
        """Raise: nobody else has the keys."""
        raise StoreUnavailable(reason_of(error)) from error

    async def aclose(self) -> None:
        """Do nothing."""
