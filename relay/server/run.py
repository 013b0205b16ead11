"""The process: listening, signals, an orderly end. Runs a relay beside its web server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TypeVar

from relay.relay import Relay
from relay.server.listeners import Listeners
from relay.server.options import ServerOptions
from relay.server.server import SIGNALS, ExporterServer, make_server
from relay.server.site import Site
from relay.web.fastpath.shared import FastPath

T = TypeVar("T")

_log = logging.getLogger("relay.server")


def raise_file_limit() -> None:
    """Allow as many connections as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run(site: Site, options: ServerOptions, listeners: Listeners) -> None:
    """Serve until a signal, then end in order; stores are written before this returns.

    Args:
        site: what is served.
        options: how.
        listeners: closed at the end.
    """
    raise_file_limit()
    # uvicorn warns of each malformed request: traffic that hostile clients could fill a disk with.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    relay = site.relay
    door = FastPath(
        relay, site.poll, options.limits, site.traffic, site.posts, evaluation=site.questions
    )
    server = make_server(relay, site.app, options, door)
    async with relay.upstream, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run()) for run in (relay.run, *site.background)]
        forwarding = tasks.create_task(relay.events.run()) if relay.events else None

        def end() -> None:
            """Write stores and deliver events while streams end."""
            _cancel(running)
            if relay.events:
                relay.events.flush()

        server.on_shutdown = end
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at again
        exporter = None
        if site.exporter and listeners.exporter:
            exporter = ExporterServer(site.exporter, options)
            tasks.create_task(exporter.serve(sockets=[listeners.exporter]))
        try:
            await server.serve(sockets=[listeners.main])
        finally:
            # Only now: requests on their way have brought their events.
            _cancel([*running, *([forwarding] if forwarding else [])])
            if exporter:
                exporter.stop()


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def serve(options: ServerOptions, build: Callable[[], Site]) -> None:
    """Listen, build what is served, and serve it until a signal.

    Args:
        options: how to serve.
        build: makes what is served. It runs in a thread once the port is open, so that connections
            wait, rather than fail, while the large libraries are imported.

    Raises:
        CannotListen: the port is taken, or not allowed.
        ConfigError: the certificate cannot be used, or `build` raised it.
    """
    if options.tls:
        options.tls.check()
    listeners = Listeners.of(options)
    if options.tls:
        _log.info("TLS enabled for server (minimum TLS version: %s)", options.tls.minimum)
    asked_to_end = _asked_to_end()
    with _noted_hangups():
        try:
            site = await asyncio.to_thread(build)
        except BaseException:
            listeners.close()
            raise
        if asked_to_end.is_set():
            listeners.close()
            return
        await run(site, options, listeners)


@contextlib.contextmanager
def _noted_hangups() -> Iterator[None]:
    """Log that SIGHUP changes nothing. Before and after it waits, if the process keeps it so."""
    text = (
        "SIGHUP changes nothing: the configuration is read at the start; restart to read it again"
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _log.warning, text)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        loop.remove_signal_handler(signal.SIGHUP)


def _asked_to_end() -> asyncio.Event:
    """Return what the first signal sets, as long as no server has taken signals over."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, asked.set)
    return asked


async def until_signal(work: Coroutine[object, object, T]) -> T | None:
    """Return what comes of some work; None if a signal ended it before."""
    asked_to_end = asyncio.create_task(_asked_to_end().wait())
    working = asyncio.create_task(work)
    await asyncio.wait({working, asked_to_end}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, asked_to_end):
        task.cancel()
    await asyncio.wait({working, asked_to_end})
    return None if working.cancelled() else working.result()


async def run_once(relay: Relay, *, fail_fast: bool = False) -> bool:
    """Run the relay until each environment and its database have the data: `exitAlways`.

    Args:
        relay: what is run, without being served.
        fail_fast: stop at the first environment that fails: `exitOnError`.

    Returns:
        Whether all environments got there within `initTimeout`, and before a signal.
    """
    asked_to_end = _asked_to_end()
    async with relay.upstream, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(relay.run())
        settled = tasks.create_task(relay.wait_until_synced(fail_fast=fail_fast))
        ended = tasks.create_task(asked_to_end.wait())
        await asyncio.wait({settled, ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, settled, ended):
            task.cancel()
    return not settled.cancelled() and settled.result()
