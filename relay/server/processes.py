"""The processes of a relay with workers: what each of them runs, and how it shows that it lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial

import uvloop

from relay.imports import garbage_collection_paused
from relay.server.children import ADOPT, ALIVE_EVERY, FAILED
from relay.server.listeners import Listeners
from relay.server.options import ServerOptions
from relay.server.run import hangups_noted, raise_file_limit, run, run_relay, shutdown_event
from relay.server.server import RelayServer, make_server
from relay.server.site import Site
from relay.server.workersites import FeederSite


class Lifeline:
    """Connection to the supervisor: shows signs of life, and ends the process with it.

    Args:
        control: our end of the control socket.
    """

    def __init__(self, control: socket.socket) -> None:
        self.on_command: Callable[[bytes, int], None] = lambda _command, _number: None
        """Called with a command and the number of the worker that it is about."""
        self.on_end: Callable[[], None] = partial(signal.raise_signal, signal.SIGTERM)
        """Called when the supervisor is gone, and with it whoever would replace us."""
        self._control = control
        control.setblocking(False)

    def __repr__(self) -> str:
        return f"<Lifeline {self._control.fileno()}>"

    async def run(self) -> None:
        """Show signs of life until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control, self._read)
        try:
            while True:
                with contextlib.suppress(OSError):
                    self._control.send(b".")
                await asyncio.sleep(ALIVE_EVERY)
        finally:
            loop.remove_reader(self._control)

    def _read(self) -> None:
        try:
            commands = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            commands = b""
        for start in range(0, len(commands), 2):
            self.on_command(commands[start : start + 1], commands[start + 1])
        if not commands:
            asyncio.get_running_loop().remove_reader(self._control)
            self.on_end()


def run_feeder(
    control: socket.socket,
    build: Callable[[asyncio.Event], FeederSite],
    options: ServerOptions,
    listener: socket.socket,
    exporter: socket.socket | None,
) -> None:
    """Run the feeder until a signal.

    Args:
        control: our end of the control socket.
        build: makes the site; takes an event that SIGHUP sets.
        options: options of the servers.
        listener: to which workers connect.
        exporter: for metrics on a port of their own.

    Raises:
        ConfigError: raised by `build`.
    """

    async def main() -> None:
        raise_file_limit()
        stop, hangups = shutdown_event(), asyncio.Event()
        with hangups_noted(hangups):
            with garbage_collection_paused():
                site = build(hangups)

            async def serve(begin_shutdown: Callable[[], None]) -> None:
                async with asyncio.TaskGroup() as tasks:
                    work = (site.feeder.run(listener), Lifeline(control).run())
                    running = [tasks.create_task(each) for each in work]
                    await stop.wait()
                    site.relay.stopping = True
                    begin_shutdown()
                    for each in running:
                        each.cancel()

            await run_relay(site, options, serve, exporter)

    uvloop.run(main())


def run_worker(
    control: socket.socket,
    build: Callable[[asyncio.Event], Site],
    options: ServerOptions,
    listeners: Sequence[socket.socket],
    number: int,
) -> None:
    """Run a worker until a signal.

    Args:
        control: our end of the control socket.
        build: makes the site; takes an event that SIGHUP sets.
        options: options of the servers.
        listeners: sockets of all workers.
        number: of this worker.

    Raises:
        ConfigError: raised by `build`.
    """

    async def main() -> None:
        stop, hangups = shutdown_event(), asyncio.Event()
        lifeline = Lifeline(control)
        lifeline.on_end = partial(os._exit, FAILED)  # at once: the port has to be free
        living = asyncio.create_task(lifeline.run())
        with hangups_noted(hangups):
            with garbage_collection_paused():
                site = build(hangups)
            server = make_server(site.relay, site.app, options, site.fast_path)
            lifeline.on_command = partial(_substitute, server, listeners)
            if not stop.is_set():
                await run(site, options, Listeners(listeners[number]), server)
        living.cancel()

    uvloop.run(main())


_adoptions: set[asyncio.Task[None]] = set()


def _substitute(
    server: RelayServer, listeners: Sequence[socket.socket], command: bytes, number: int
) -> None:
    """Accept connections on the socket of another worker, or no longer."""
    if command == ADOPT:
        adoption = asyncio.create_task(server.adopt(number, listeners[number]))
        _adoptions.add(adoption)
        adoption.add_done_callback(_adoptions.discard)
    else:
        server.release(number)
