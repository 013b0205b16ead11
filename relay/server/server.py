"""The HTTP servers of the process: uvicorn with our protocol, our signals and our shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import uvicorn
from starlette.types import ASGIApp

from relay.relay import Relay
from relay.server.listeners import BACKLOG
from relay.server.options import ServerOptions
from relay.web.fastpath.protocol import protocol_factory
from relay.web.fastpath.shared import FastPath
from relay.web.protocol import HTTPProtocol

_log = logging.getLogger("relay.server")


STREAMS_SHARE = 0.75
"""Share of the drain time in which streams end; the rest is for responses on their way."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks the process to end."""


class RelayServer(uvicorn.Server):
    """uvicorn's server with our signals, our clock and our end.

    Args:
        config: uvicorn's.
        relay: whose streams are ended at shutdown.
        fast_path: looks after connections; None if the application answers everything.
        drain: the longest time that the end may take, in seconds.
    """

    def __init__(
        self, config: uvicorn.Config, relay: Relay, fast_path: FastPath | None, drain: float
    ) -> None:
        super().__init__(config)
        self._relay = relay
        self._fast_path = fast_path
        self._drain = drain
        self.on_shutdown: Callable[[], object] = lambda: None
        """Called when the end begins, beside which it may do its work."""
        self._ending: asyncio.Task[None] | None = None
        self._asked_to_end = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at the first signal, orderly; at the second, now. Signals are not raised again."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin the end; called again, hurry."""
        if self.should_exit:
            self.force_exit = True
            if self._ending:
                self._ending.cancel()
        elif self._relay.environments:
            streams = sum(len(each.hub) for each in self._relay.environments.values())
            _log.info("Stopping: ending %d streams within %g s", streams, self._drain)
        self._relay.stopping = True
        self.should_exit = True
        self._asked_to_end.set()

    async def main_loop(self) -> None:
        """Look after connections until the end begins.

        uvicorn wakes up ten times a second, to see whether it shall end and what time it is; the
        door renews the date when somebody comes.
        """
        if self._fast_path is None:
            await super().main_loop()
            return
        # One task that ends once, not a time-out that is thrown each time.
        asked_to_end = asyncio.create_task(self._asked_to_end.wait())
        while not self.should_exit:
            self._fast_path.sweep(self.server_state)
            await asyncio.wait([asked_to_end], timeout=self._fast_path.limits.sweep_interval)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, end streams, then let uvicorn wait for responses on their way."""
        self._relay.stopping = True
        self.on_shutdown()
        for server in self.servers:
            server.close()
        self._ending = asyncio.create_task(self._end_streams())
        await asyncio.wait([self._ending])
        await super().shutdown(sockets)

    async def _end_streams(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for environment in self._relay.environments.values():
                tasks.create_task(environment.hub.close(self._drain * STREAMS_SHARE))


class ExporterServer(RelayServer):
    """The server of the figures' own port, with the front door's limits and nobody to open it.

    Args:
        app: the figures.
        options: how the relay is served.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        nothing = Relay([], 0.0)
        door = FastPath(nothing, None, options.limits)
        config = _uvicorn_config(app, replace(options, tls=None), door)
        super().__init__(config, nothing, door, options.drain)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the server of the relay, which ends this one."""
        yield


def make_server(
    relay: Relay, app: ASGIApp, options: ServerOptions, fast_path: FastPath | None
) -> RelayServer:
    """Return a server that is ready to run.

    Args:
        relay: what is served.
        app: the application behind the front door.
        options: how.
        fast_path: the front door; None to let the application answer everything.
    """
    return RelayServer(_uvicorn_config(app, options, fast_path), relay, fast_path, options.drain)


def _uvicorn_config(
    app: ASGIApp, options: ServerOptions, fast_path: FastPath | None
) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=protocol_factory(fast_path) if fast_path else HTTPProtocol,
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(options.limits.keep_alive),
        timeout_graceful_shutdown=max(1, round(options.drain * (1 - STREAMS_SHARE))),
    )
    config.load()
    config.ssl = options.tls.context() if options.tls else None
    return config
