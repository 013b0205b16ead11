"""A relay with several processes: opens their sockets, and says what each of them runs."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from relay.announcement import announce
from relay.config.render import secrets as secrets_of
from relay.config.schema import Config
from relay.errors import ConfigError
from relay.server.children import FAILED, Child
from relay.server.listeners import CannotListen, listen_for_exporter, listen_for_workers
from relay.server.options import ServerOptions
from relay.server.processes import run_feeder, run_worker
from relay.server.supervisor import Supervisor
from relay.server.workersites import build_feeder_site, build_worker_site
from relay.telemetry.log import LogHandler, WorkerFilter, direct_handler, set_up
from relay.workers.counts import shared_memory

FEEDER_SILENCE, WORKER_SILENCE = 3.0, 5.0
"""Seconds without a sign of life after which a process is killed."""

WORKERS_SHARE = 0.7
"""Share of the drain time in which workers end streams; the rest is the feeder's, for events."""

CONNECTIONS = 1024
"""Maximum number of workers' connections that wait for a feeder."""

_log = logging.getLogger("relay.server")

Read = Callable[[], Config]


class _Work(Struct, frozen=True):
    """Work of the processes.

    Args:
        config: configuration of the relay.
        options: options of the servers.
        read: reads the configuration again.
        address: of the feeder's socket.
        memory: shared by one feeder after the other.
    """

    config: Config
    options: ServerOptions
    read: Read
    address: str | bytes
    memory: mmap.mmap

    def feed(
        self, listener: socket.socket, exporter: socket.socket | None, control: socket.socket
    ) -> int:
        """Be the feeder; return the exit code."""
        build = partial(build_feeder_site, self.config, self.options, self.memory, self.read)
        run = partial(run_feeder, control, build, self.options, listener, exporter)
        return _run(self.config, run)

    def serve(self, number: int, listeners: Sequence[socket.socket], control: socket.socket) -> int:
        """Be a worker; return the exit code."""
        config, read, address = self.config, self.read, self.address
        options = replace(self.options, drain=self.options.drain * WORKERS_SHARE)
        build = partial(build_worker_site, config, options, read, address=address, number=number)
        return _run(
            config, partial(run_worker, control, build, options, listeners, number), WorkerFilter()
        )


def serve_with_workers(config: Config, greeting: str, read: Read) -> int:
    """Serve until a signal; return the exit code of the process.

    Args:
        config: configuration of the relay.
        greeting: the first line of the log.
        read: reads the configuration again.
    """
    set_up(config.main.log_level, config.main.log_format, direct_handler())
    _log.info("%s", greeting)
    for warning in config.warnings:
        _log.warning("%s", warning)
    options = ServerOptions.of(config)
    number = config.main.workers or _usable_cores()
    try:
        listeners = listen_for_workers(options.port, number)
        exporter = _exporter(options)
    except CannotListen as e:
        _log.error("%s", e)
        return FAILED
    port = listeners[0].getsockname()[1]
    _log.info("Starting server listening on port %d with %d workers", port, number)
    announcement = announce(port, tls=options.tls is not None)
    feeder_listener, address = _feeder_listener()
    work = _Work(config, options, read, address, shared_memory())
    feeder = Child("feeder", FEEDER_SILENCE, partial(work.feed, feeder_listener, exporter))
    workers = [
        Child(f"worker {index}", WORKER_SILENCE, partial(work.serve, index, listeners))
        for index in range(number)
    ]
    try:
        return Supervisor(feeder, workers, options.drain).run()
    finally:
        for each in (*listeners, exporter, announcement, feeder_listener):
            if each is not None:
                each.close()
        if isinstance(address, str):
            with suppress(OSError):
                Path(address).unlink()


def _usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = float(os.cpu_count() or 1)
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def _exporter(options: ServerOptions) -> socket.socket | None:
    if options.exporter_port is None:
        return None
    exporter = listen_for_exporter(options.exporter_port)
    port = exporter.getsockname()[1]
    _log.info("Successfully registered Prometheus metrics exporter on port %d", port)
    return exporter


def _feeder_listener() -> tuple[socket.socket, str | bytes]:
    """Return the socket to which workers connect, and its address.

    On Linux it has a name without a file, as a container may have no place to write.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name = f"relay-feeder-{os.getpid()}-{secrets.token_hex(8)}"
    if sys.platform == "linux":
        address: str | bytes = f"\0{name}".encode()
    else:
        address = str(Path(tempfile.mkdtemp()) / name)
    listener.bind(address)
    listener.listen(CONNECTIONS)
    listener.setblocking(False)
    return listener, address


def _run(config: Config, run: Callable[[], None], lines: logging.Filter | None = None) -> int:
    """Run a process with its log; return its exit code."""
    output = LogHandler(secrets_of(config))
    if lines is not None:
        output.addFilter(lines)
    set_up(config.main.log_level, config.main.log_format, output)
    try:
        run()
    except ConfigError as e:
        _log.error("Unable to create relay: %s", e)
        return FAILED
    finally:
        output.close()
    return 0
