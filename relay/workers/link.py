"""Connection of a worker to the feeder, made anew whenever it ends.

To the worker's relay the feeder is a directory, the source of all data, the acceptor of events and
the way to LaunchDarkly. While there is none the worker serves on.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from relay.environment import ConnectionState, UpstreamConnection
from relay.protocol.workers import (
    FROM_FEEDER,
    Answer,
    Data,
    EnvironmentGone,
    EnvironmentPut,
    Fed,
    FiguresRequest,
    FromFeeder,
    FromWorker,
    Hello,
    Listed,
    Memberships,
    NotStored,
    Refused,
    Settled,
    Stored,
)
from relay.relay import DirectoryChange, Relay
from relay.workers.connection import Connection
from relay.workers.environments import FedEnvironments, Parts
from relay.workers.posts import WAIT, PostSender
from relay.workers.requests import Requests

RECONNECT_AFTER = 0.02
"""Seconds between two attempts to connect: connections wait in the socket for the next feeder."""


class FeederLink:
    """Directory of a worker's relay.

    Args:
        address: of the feeder's socket.
        worker: number of this worker.
        parts: makes environments.
    """

    is_upstream = False

    def __init__(self, address: str | bytes, worker: int, parts: Parts) -> None:
        self.connection = UpstreamConnection()
        self.known = asyncio.Event()
        self.changes: Counter[DirectoryChange] = Counter()
        self.invalid_entries: Mapping[tuple[str, str], str] = {}
        self._fed = asyncio.Event()
        """Set once the feeder has sent all data that it had."""
        self.posts = PostSender(self.send)
        self.requests = Requests(self.send)
        self.on_figures_request: Callable[[], None] = lambda: None
        """Called when the feeder wants the figures of this worker now."""
        self._address = address
        self._worker = worker
        self._parts = parts
        self._feeder: Connection[FromFeeder] | None = None
        self._ended = asyncio.Event()
        self._environments: FedEnvironments | None = None

    def __repr__(self) -> str:
        return f"<FeederLink of worker {self._worker}: {self.connection.state.value}>"

    async def run(self, relay: Relay) -> None:
        """Let the environments of a relay be those of the feeder, until cancelled."""
        environments = self._environments = FedEnvironments(relay, self._parts, self.send)
        try:
            while True:
                if await self._connect(environments):
                    await self._ended.wait()
                    environments.interrupt()
                else:
                    self.posts.refuse_late()
                await asyncio.sleep(RECONNECT_AFTER)
        finally:
            if self._feeder is not None:
                self._feeder.close()

    async def ready(self) -> None:
        """Wait until the relay has the data that the feeder had at first."""
        await self._fed.wait()
        if self._environments is not None:
            await self._environments.current()

    def send(self, message: FromWorker) -> bool:
        """Send a message; return False if there is no feeder."""
        if self._feeder is None:
            return False
        self._feeder.send(message)
        return True

    async def _connect(self, environments: FedEnvironments) -> bool:
        """Connect to the feeder, and begin; return False if that failed."""
        self._ended.clear()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        receive = partial(self._receive, environments)
        try:
            async with asyncio.timeout(WAIT):
                await loop.sock_connect(client, self._address)
            _, feeder = await loop.create_unix_connection(
                lambda: Connection(FROM_FEEDER, receive, self._lost), sock=client
            )
        except OSError:
            client.close()
            return False
        feeder.send(Hello(self._worker, os.getpid(), environments.begin()))
        for post in self.posts.waiting():
            feeder.send(post)
        self._feeder = feeder
        self.connection.enter(ConnectionState.VALID)
        return True

    def _lost(self, _connection: Connection[FromFeeder]) -> None:
        self._feeder = None
        self.requests.cancel()
        self.connection.enter(ConnectionState.INTERRUPTED)
        self._ended.set()

    def _receive(
        self,
        environments: FedEnvironments,
        _connection: Connection[FromFeeder],
        message: FromFeeder,
    ) -> None:
        match message:
            case Data():
                environments.receive(message)
            case Stored() | NotStored() | Answer():
                self._finish(message)
            case EnvironmentPut() | EnvironmentGone() | Listed():
                self._list(environments, message)
            case Memberships():
                environments.forget_memberships(message)
            case Refused():
                environments.refuse(message.number)
            case Settled():
                environments.settle(message.number, message.change)
            case FiguresRequest():
                self.on_figures_request()
            case Fed():
                self.requests.begin()
                self._fed.set()

    def _list(
        self, environments: FedEnvironments, message: EnvironmentPut | EnvironmentGone | Listed
    ) -> None:
        match message:
            case EnvironmentPut():
                environments.put(message.number, message.complete)
            case EnvironmentGone():
                environments.remove(message.number)
            case Listed():
                environments.carry_out(message.sharing)
                if message.known:
                    self.known.set()

    def _finish(self, message: Stored | NotStored | Answer) -> None:
        match message:
            case Stored():
                self.posts.finish(message)
            case NotStored():
                self.posts.refuse(message.number)
            case Answer():
                self.requests.finish(message)
