"""Where flags come from: LaunchDarkly, or a file."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from relay.config.schema import Config
from relay.model.environment import EnvironmentSpec
from relay.sources import DataSource
from relay.sources.timings import SourceTimings
from relay.telemetry.log import Log

if TYPE_CHECKING:
    from relay.upstream import Upstream as HTTPSession

Session = AbstractAsyncContextManager[object]
SourceFactory = Callable[[EnvironmentSpec, Log], DataSource]


def from_file(config: Config) -> SourceFactory:
    """Return what reads the configured flags file, for the only environment that there is."""
    from relay.sources.file import FileSource

    path = Path(config.main.flags_file)
    return lambda _spec, _log: FileSource(path)


def from_launchdarkly(config: Config) -> tuple[HTTPSession, SourceFactory]:
    """Return the session with LaunchDarkly, and what makes sources that share it.

    Raises:
        ConfigError: a file of CA certificates is unusable.
    """
    from relay.sources.polling import PollingSource
    from relay.sources.streaming import StreamingSource

    main, upstream = config.main, http_session(config)
    timings = SourceTimings(poll_interval=main.poll_interval)
    polls = main.data_source == "polling"

    def fdv1(spec: EnvironmentSpec, log: Log) -> DataSource:
        key, payload_filter = spec.sdk_key, spec.payload_filter
        if polls:
            uri = main.base_uri
            return PollingSource(upstream, uri, key, timings, payload_filter=payload_filter)
        uri = main.stream_uri
        return StreamingSource(upstream, uri, key, log, timings, payload_filter=payload_filter)

    def fdv2(spec: EnvironmentSpec, log: Log) -> DataSource:
        from relay.sources.fdv2 import FDv2Source

        return FDv2Source(
            upstream,
            main.base_uri,
            None if polls else main.stream_uri,
            spec.sdk_key,
            make_fdv1=lambda: fdv1(spec, log),
            log=log,
            timings=timings,
            payload_filter=spec.payload_filter,
        )

    return upstream, fdv2 if main.data_system == "fdv2" else fdv1


def no_source(_spec: EnvironmentSpec, _log: Log) -> DataSource:
    """Make no source: environments are made with one.

    Raises:
        TypeError: one was not.
    """
    raise TypeError("an environment is made without a source")


def http_session(config: Config) -> HTTPSession:
    """Return a new session for requests to other servers, as configured.

    Raises:
        ConfigError: a file of CA certificates is unusable.
    """
    from relay.upstream import Upstream as HTTPSession

    http = config.http
    return HTTPSession(
        proxy=config.proxy.url or None,
        ca_files=[Path(file) for file in config.proxy.ca_cert_files if file],
        keep_alive=0.0 if http.disable_keep_alives else http.idle_conn_timeout,
    )
