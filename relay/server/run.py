"""Run a relay and its web server in this process: listen, handle signals, shut down in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TypeVar

from relay.imports import garbage_collection_paused
from relay.relay import Relay
from relay.server.listeners import Listeners
from relay.server.options import ServerOptions
from relay.server.server import SIGNALS, ExporterServer, RelayServer, make_server
from relay.server.site import RelaySite, Site

T = TypeVar("T")

_log = logging.getLogger("relay.server")


def raise_file_limit() -> None:
    """Raise the limit on open files, and so on connections, to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run(
    site: Site, options: ServerOptions, listeners: Listeners, server: RelayServer | None = None
) -> None:
    """Serve until a signal, then shut down in order; stores are flushed before this returns.

    Args:
        site: relay and application to serve.
        options: options of the servers.
        listeners: listening sockets; closed at the end.
        server: of the site; made if omitted.
    """
    raise_file_limit()
    # uvicorn warns about every malformed request, so hostile clients could fill a disk with logs.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    server = server or make_server(site.relay, site.app, options, site.fast_path)

    async def serve(begin_shutdown: Callable[[], None]) -> None:
        if site.ready and not await _ready(site):
            return
        if not site.ends_last:
            server.on_shutdown = begin_shutdown
        await server.serve(sockets=[listeners.main])

    await run_relay(site, options, serve, listeners.exporter)


async def _ready(site: Site) -> bool:
    """Wait until a site can accept connections; return False if a signal comes before."""
    ready = asyncio.create_task(site.ready()) if site.ready else None
    stop = asyncio.create_task(shutdown_event().wait())
    waiting = {stop, ready} if ready else {stop}
    await asyncio.wait(
        waiting, timeout=site.relay.init_timeout, return_when=asyncio.FIRST_COMPLETED
    )
    for task in waiting:
        task.cancel()
    return not stop.done()


async def run_relay(
    site: RelaySite,
    options: ServerOptions,
    serve: Callable[[Callable[[], None]], Coroutine[object, object, None]],
    exporter_socket: socket.socket | None = None,
) -> None:
    """Run a relay with all that goes on beside it, as long as something is served.

    Args:
        site: the relay.
        options: options of the servers.
        serve: serves; calls its argument as soon as it ends.
        exporter_socket: for the metrics of the site's exporter; None without a port for them.
    """
    relay = site.relay
    async with relay.upstream, asyncio.TaskGroup() as tasks:
        background = (run() for run in (relay.run, *site.background))
        starting = _start_without_collections(relay)
        running = [tasks.create_task(each) for each in (*background, starting)]
        forwarding = tasks.create_task(relay.events.run()) if relay.events else None

        def begin_shutdown() -> None:
            """Flush stores and deliver events while streams end."""
            _cancel(running)
            if relay.events:
                relay.events.flush()

        exporter = None
        if site.exporter and exporter_socket:
            exporter = ExporterServer(site.exporter, options)
            tasks.create_task(exporter.serve(sockets=[exporter_socket]))
        try:
            await serve(begin_shutdown)
        finally:
            # Not earlier: requests in flight may still have brought events.
            _cancel([*running, *([forwarding] if forwarding else [])])
            if exporter:
                exporter.stop()


async def _start_without_collections(relay: Relay) -> None:
    """Pause the garbage collector while a relay starts.

    With hundreds of environments it takes a tenth of the start, and finds nothing: what it looks at
    lives on. Nor does a connection leave any garbage.
    """
    with garbage_collection_paused():
        await relay.wait_until_started()


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def serve(
    options: ServerOptions, build: Callable[[], Site], hangups: asyncio.Event | None = None
) -> None:
    """Listen, build the site, and serve it until a signal.

    Args:
        options: options of the servers.
        hangups: is set by SIGHUP, for the site; None to ignore the signal.
        build: makes the site. It runs in a thread once the port is open, so that connections wait,
            rather than fail, while the large libraries are imported.

    Raises:
        CannotListen: the port is in use, or not permitted.
        ConfigError: the certificate is unusable, or `build` raised it.
    """
    if options.tls:
        options.tls.check()
    listeners = Listeners.of(options)
    if options.tls:
        _log.info("TLS enabled for server (minimum TLS version: %s)", options.tls.minimum)
    shutdown_requested = shutdown_event()
    with hangups_noted(hangups or asyncio.Event()):
        try:
            with garbage_collection_paused():
                site = await asyncio.to_thread(build)
        except BaseException:
            listeners.close()
            raise
        if shutdown_requested.is_set():
            listeners.close()
            return
        await run(site, options, listeners)


@contextlib.contextmanager
def hangups_noted(hangups: asyncio.Event) -> Iterator[None]:
    """Set an event with each SIGHUP; outside this block the signal stays blocked if it was."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hangups.set)
    old_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        loop.remove_signal_handler(signal.SIGHUP)


def shutdown_event() -> asyncio.Event:
    """Return an event that the first signal sets, until a server installs its own handlers."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, event.set)
    return event


async def until_signal(work: Coroutine[object, object, T]) -> T | None:
    """Return the result of a coroutine; None if a signal cancelled it."""
    signalled = asyncio.create_task(shutdown_event().wait())
    working = asyncio.create_task(work)
    await asyncio.wait({working, signalled}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, signalled):
        task.cancel()
    await asyncio.wait({working, signalled})
    return None if working.cancelled() else working.result()


async def run_once(relay: Relay, *, fail_fast: bool = False) -> bool:
    """Run the relay until every environment and its database have the data: `exitAlways`.

    Args:
        relay: the relay to run, without a server.
        fail_fast: stop at the first environment that fails: `exitOnError`.

    Returns:
        True if all environments were synced within `initTimeout`.
    """
    async with relay.upstream, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(relay.run())
        try:
            return await relay.wait_until_synced(fail_fast=fail_fast)
        finally:
            running.cancel()
