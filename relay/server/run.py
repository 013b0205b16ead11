"""The process: listening, signals, an orderly end. Runs a relay beside its web server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

from relay.cli.health import announce
from relay.config.schema import Config
from relay.errors import ConfigError, RelayError
from relay.reasons import describe
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.tls import EncryptedKey, load_key_pair
from relay.web.fastpath.events import EventsFastPath
from relay.web.fastpath.protocol import protocol_factory
from relay.web.fastpath.shared import ConnectionLimits, EvaluationResponder, FastPath, PollResponder
from relay.web.protocol import HTTPProtocol

BACKLOG = 16 * 1024
"""Connections that may wait to be accepted: thousands of SDKs come back at once after an outage.
The kernel lowers it to its own limit."""

UNSENT_LIMIT = 512 * 1024
"""Bytes that the kernel takes from us beyond what is on its way: on the same machine a usual
payload at once, for each time that we are told to go on costs more than writing does; and all that
a client that does not read costs there. Over a network the kernel takes less by itself, and unlike
a capped send buffer this does not hurt long distances."""

DEAD_AFTER_MS = 60_000
"""Milliseconds after which a connection whose data nobody acknowledges is given up."""

PROBE_AFTER, PROBE_EACH, PROBES = 60, 15, 4
"""Seconds of silence before the kernel probes, seconds between probes, and their number."""

STREAMS_SHARE = 0.75
"""Share of the drain time in which streams end; the rest is for responses on their way."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks the process to end."""

T = TypeVar("T")

_log = logging.getLogger("relay.server")

TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES"
"""Of TLS 1.2, those of Go, and so of the reference."""


class CannotListen(RelayError):
    """The port cannot be listened on."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """With what TLS is served.

    Args:
        cert: file of the certificate and its chain.
        key: file of the private key.
        minimum: version of the protocol, a key of `TLS_VERSIONS`.
    """

    cert: Path
    key: Path
    minimum: str = "1.2"

    def check(self) -> None:
        """See that the files can be used.

        Raises:
            ConfigError: they cannot; says which, and why.
        """
        self.context()

    def context(self) -> ssl.SSLContext:
        """Return what serves TLS.

        Raises:
            ConfigError: the files cannot be used; says which, and why.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            load_key_pair(made, self.cert, self.key)
        except EncryptedKey as e:
            raise ConfigError([f"[Main] tlsKey: {e}"]) from e
        except (OSError, ssl.SSLError) as e:
            files = f"TLS certificate {self.cert} with key {self.key}"
            raise ConfigError([f"{files} cannot be used: {e.strerror or e}"]) from e
        made.set_ciphers(CIPHERS)
        made.minimum_version = TLS_VERSIONS[self.minimum]
        return made


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the relay is served. Times in seconds.

    Args:
        port: to listen on; 0 for any free one.
        tls: None for plain HTTP.
        drain: the longest time that ending streams and responses may take. The default leaves
            room within the 10 s that `docker stop` allows.
        limits: what a connection may cost.
        exporter_port: for figures alone, without TLS; None for no such port.
    """

    port: int = 8030
    tls: Certificate | None = None
    drain: float = 8.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    exporter_port: int | None = None

    @classmethod
    def of(cls, config: Config) -> ServerOptions:
        """Return what a configuration says."""
        main, prometheus = config.main, config.prometheus
        certificate = Certificate(Path(main.tls_cert), Path(main.tls_key), main.tls_min_version)
        limits = ConnectionLimits(
            max_head_size=main.max_request_head_size, stall_timeout=main.client_stall_timeout
        )
        return cls(
            port=main.port,
            tls=certificate if main.tls_enabled else None,
            drain=main.graceful_shutdown_timeout,
            limits=limits,
            exporter_port=prometheus.port if prometheus.enabled else None,
        )


def listen(port: int) -> socket.socket:
    """Return a socket that listens on all interfaces, IPv6 and IPv4.

    Raises:
        CannotListen: the port is taken, or not allowed.
    """
    return _listen(port, f"Error starting http listener on port: {port} ")


def listen_for_exporter(port: int) -> socket.socket:
    """Return a socket for the port of `[Prometheus]`.

    Raises:
        CannotListen: the port is taken, or not allowed.
    """
    return _listen(port, "Error registering Prometheus metrics exporter:")


def _listen(port: int, trouble: str) -> socket.socket:
    try:
        return _listening(port)
    except OSError as e:
        raise CannotListen(f"{trouble} listen tcp :{port}: {describe(e)}") from e


def _listening(port: int) -> socket.socket:
    family = socket.AF_INET6 if _has_ipv6() else socket.AF_INET
    # Without its protocol number asyncio would not switch off Nagle's algorithm.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _guard(listener)
        listener.bind(("", port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("", 0))
    except OSError:
        return False
    return True


def _guard(listener: socket.socket) -> None:
    """Bound what a silent client costs; accepted sockets inherit these options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER),
        ("TCP_KEEPINTVL", PROBE_EACH),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", DEAD_AFTER_MS),
        ("TCP_NOTSENT_LOWAT", UNSENT_LIMIT),
    ):
        if hasattr(socket, name):  # some are Linux's only
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def raise_file_limit() -> None:
    """Allow as many connections as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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


@dataclass(frozen=True, slots=True)
class Site:
    """What is served: a relay, the application, and what the front door has in common with it."""

    relay: Relay
    app: ASGIApp
    poll: PollResponder | None = None
    traffic: RequestMetrics | None = None
    exporter: ASGIApp | None = None
    """What is served on a port of its own."""
    background: Sequence[Callable[[], Coroutine[object, object, None]]] = ()
    """What runs as long as the server does."""
    posts: EventsFastPath | None = None
    questions: EvaluationResponder | None = None


@dataclass(frozen=True, slots=True)
class Listeners:
    """Listening sockets, and what tells of them."""

    main: socket.socket
    exporter: socket.socket | None = None
    announcement: socket.socket | None = None
    """Tells `relay health` where the main one is."""

    @classmethod
    def of(cls, options: ServerOptions) -> Listeners:
        """Listen on the ports that the options name; say so.

        Raises:
            CannotListen: a port is taken, or not allowed.
        """
        main = listen(options.port)
        port = main.getsockname()[1]
        _log.info("Starting server listening on port %d", port)
        announcement = announce(port, tls=options.tls is not None)
        if options.exporter_port is None:
            return cls(main, None, announcement)
        try:
            exporter = listen_for_exporter(options.exporter_port)
        except CannotListen:
            cls(main, None, announcement).close()
            raise
        port = exporter.getsockname()[1]
        _log.info("Successfully registered Prometheus metrics exporter on port %d", port)
        return cls(main, exporter, announcement)

    def close(self) -> None:
        """Refuse those who wait."""
        for each in (self.main, self.exporter, self.announcement):
            if each:
                each.close()


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
