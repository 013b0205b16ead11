"""HTTP servers of the process: uvicorn with a protocol, signal handling and shutdown of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from msgspec.structs import replace
from starlette.types import ASGIApp

from relay.relay import Relay
from relay.server.listeners import BACKLOG
from relay.server.options import ServerOptions
from relay.web.fastpath.protocol import protocol_factory
from relay.web.fastpath.shared import FastPath
from relay.web.handlers import Handlers
from relay.web.protocol import HTTPProtocol

_log = logging.getLogger("relay.server")


STREAMS_SHARE = 0.75
"""Share of the drain time during which streams end; the rest is for responses in flight."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that shut the process down."""


class RelayServer(uvicorn.Server):
    """uvicorn's server with different signal handling, main loop and shutdown.

    Args:
        config: configuration of uvicorn.
        relay: its streams are ended at shutdown.
        fast_path: state shared by the connections; None if the application answers everything.
        drain: time limit for the shutdown, in seconds.
    """

    def __init__(
        self, config: uvicorn.Config, relay: Relay, fast_path: FastPath | None, drain: float
    ) -> None:
        super().__init__(config)
        self._relay = relay
        self._fast_path = fast_path
        self._drain = drain
        self.on_shutdown: Callable[[], object] = lambda: None
        """Called when the shutdown begins; it may start tasks that run meanwhile."""
        self._ending_streams: asyncio.Task[None] | None = None
        self._shutdown_requested = asyncio.Event()
        self._adopted: dict[int, asyncio.Server] = {}
        """By number of a worker that is away, what accepts on its socket."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Shut down gracefully at the first signal, at once at the second. Re-raise no signal."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def adopt(self, number: int, listener: socket.socket) -> None:
        """Accept connections on a further socket, that of another worker.

        Args:
            number: of the other worker.
            listener: its socket.
        """
        make_protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        state = self.lifespan.state
        make = partial(
            make_protocol, config=self.config, server_state=self.server_state, app_state=state
        )
        self._adopted[number] = await asyncio.get_running_loop().create_server(
            make, sock=listener.dup(), ssl=self.config.ssl, backlog=BACKLOG
        )

    def release(self, number: int) -> None:
        """Accept no more connections on the socket of another worker."""
        server = self._adopted.pop(number, None)
        if server is not None:
            server.close()

    def stop(self) -> None:
        """Start a graceful shutdown; a second call forces it."""
        if self.should_exit:
            self.force_exit = True
            if self._ending_streams:
                self._ending_streams.cancel()
        elif self._relay.environments:
            streams = sum(len(each.hub) for each in self._relay.environments.values())
            _log.info("Stopping: ending %d streams within %g s", streams, self._drain)
        self._relay.stopping = True
        self.should_exit = True
        self._shutdown_requested.set()

    async def main_loop(self) -> None:
        """Sweep the connections at intervals until the shutdown begins.

        uvicorn would wake up ten times a second to check for a shutdown and to update the `Date`
        header. Here an event wakes the loop, and the fast path updates the date on demand.
        """
        if self._fast_path is None:
            await super().main_loop()
            return
        # One task for the whole loop is cheaper than a `TimeoutError` per iteration.
        shutdown_requested = asyncio.create_task(self._shutdown_requested.wait())
        while not self.should_exit:
            self._fast_path.sweep(self.server_state)
            await asyncio.wait([shutdown_requested], timeout=self._fast_path.limits.sweep_interval)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, end streams, then let uvicorn wait for responses in flight."""
        self._relay.stopping = True
        self.on_shutdown()
        for server in (*self.servers, *self._adopted.values()):
            server.close()
        self._ending_streams = asyncio.create_task(self._end_streams())
        await asyncio.wait([self._ending_streams])
        await super().shutdown(sockets)

    async def _end_streams(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for environment in self._relay.environments.values():
                tasks.create_task(environment.hub.close(self._drain * STREAMS_SHARE))


class ExporterServer(RelayServer):
    """Server of the separate metrics port: the same connection limits, but no relay behind it.

    Args:
        app: application that serves the metrics.
        options: options of the relay's server.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        empty_relay = Relay([], 0.0)
        fast_path = FastPath(Handlers.of(empty_relay), options.limits)
        config = _uvicorn_config(app, replace(options, tls=None), fast_path)
        super().__init__(config, empty_relay, fast_path, options.drain)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the relay's server, which stops this one."""
        yield


def make_server(
    relay: Relay, app: ASGIApp, options: ServerOptions, fast_path: FastPath | None
) -> RelayServer:
    """Return a server that is ready to run.

    Args:
        relay: relay to serve.
        app: application behind the fast path.
        options: options of the server.
        fast_path: fast path; None to let the application answer everything.
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
