"""Connection between the feeder and one worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

from relay.protocol.workers import Frames, FromFeeder, FromWorker, frame

MessageT = TypeVar("MessageT")

_log = logging.getLogger("relay.workers")


class Connection(asyncio.Protocol, Generic[MessageT]):
    """Sends and receives frames.

    Args:
        decoder: of the messages that the other side sends.
        receive: takes each of them.
        lost: is called once the connection has ended, whoever has ended it.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[MessageT],
        receive: Callable[[Connection[MessageT], MessageT], None],
        lost: Callable[[Connection[MessageT]], None],
    ) -> None:
        self._frames = Frames(decoder)
        self._receive = receive
        self._lost = lost
        self._transport: asyncio.Transport | None = None

    def __repr__(self) -> str:
        state = "closed" if self._transport is None else "open"
        return f"<Connection {state}>"

    def send(self, message: FromFeeder | FromWorker) -> None:
        """Send a message; it is dropped if the connection has ended."""
        self.write(frame(message))

    def write(self, data: bytes) -> None:
        """Send a message that is encoded already, as `send`."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Handle the messages that a piece of the stream completes."""
        try:
            for message in self._frames.feed(data):
                self._receive(self, message)
        except msgspec.MsgspecError:
            _log.exception("The processes of this relay do not understand each other")
            self.close()

    def connection_lost(self, _error: Exception | None) -> None:
        """Tell it on."""
        self._transport = None
        self._lost(self)
