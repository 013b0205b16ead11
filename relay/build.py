"""From a configuration to a relay: the parts list. The only place that chooses implementations.

What a configuration does not use is not imported: a start with a flags file loads neither the HTTP
client nor the driver of Redis.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from relay.backoff import SourceTimings
from relay.config.schema import Config, EnvironmentConfig, Main
from relay.environment import Environment
from relay.errors import ConfigError
from relay.events.forwarder import Forwarder, Upstream
from relay.events.policy import ForwarderTimings
from relay.events.store import Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.reply import Fetch
from relay.programs import ProgramCache
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.relay import Relay
from relay.sources import DataSource
from relay.stores import Mirror
from relay.streams.evaluated import client_side_channels
from relay.streams.hub import Hub, StreamLimits
from relay.sync import SyncTarget
from relay.telemetry.log import Log, environment_log, set_environment_level

DEMO = EnvironmentSpec(
    "demo", SDKKey("sdk-demo"), MobileKey("mob-demo"), EnvironmentID("demo-client-side-id")
)
"""What opens the environment that a flags file makes."""

POST_SIZE = 8 * 1024
"""Bytes for which one post counts in `[Events] capacity`: some forty events."""

SHORTEST_FLUSH = 0.01
"""Seconds: an interval of 0 would make a request of each post."""

Session = AbstractAsyncContextManager[object]
Sources = Callable[[EnvironmentSpec, Log], DataSource]


def build(config: Config) -> Relay:
    """Return the relay that a configuration describes. Nothing is connected yet.

    Raises:
        ConfigError: something that it names, such as a file of authorities, cannot be used.
    """
    events: Forwarder | None = None
    fetch: Fetch | None = None
    if config.environments:
        specs = [_spec(each, config.main) for each in config.environments]
        session, upstream, fetch, sources = _launchdarkly(config)
        events = _forwarder(config, upstream, specs)
    else:
        specs, sources, session = [_demo(config.main)], _file(config), nullcontext()
    return Relay(
        [_environment(config, spec, sources) for spec in specs],
        config.main.init_timeout,
        upstream=session,
        fetch=fetch,
        events=events,
        ignore_connection_errors=config.main.ignore_connection_errors,
        disconnected_after=config.main.disconnected_status_time,
    )


def _demo(main: Main) -> EnvironmentSpec:
    return replace(DEMO, eval_streams=main.eval_streams)


def sync_targets(
    config: Config, names: Collection[str] = (), relay_url: str = ""
) -> tuple[Session, list[SyncTarget]]:
    """Return how the data of environments get into the database once, and the session for that.

    Args:
        config: what it says of LaunchDarkly, the database and the environments counts.
        names: of the environments that are wanted; none for all.
        relay_url: a running relay that is asked instead of LaunchDarkly.

    Raises:
        ConfigError: there is no database, or no such environment; or see `build`.
    """
    from relay.stores.redis.store import RedisStore

    known, redis = [each.name for each in config.environments], config.redis
    problems = [f'there is no environment "{name}"' for name in names if name not in known]
    if not known:
        problems.append("there is no environment whose flags could be stored")
    if not redis:
        problems.append("there is no database to bring up to date; [Redis] or USE_REDIS names one")
    if problems or not redis:
        raise ConfigError(problems)
    if relay_url:
        main = replace(config.main, data_source="polling", base_uri=relay_url)
        config = replace(config, main=main)
    session, _, _, sources = _launchdarkly(config)
    found = []
    for spec in (_spec(each, config.main) for each in config.environments):
        if not names or spec.name in names:
            log = _log_of(spec)
            store = RedisStore(redis, spec.prefix)
            found.append(SyncTarget(spec, sources(spec, log), store, log))
    return session, found


def _file(config: Config) -> Sources:
    from relay.sources.file import FileSource

    path = Path(config.main.flags_file)
    return lambda _spec, _log: FileSource(path)


def _launchdarkly(config: Config) -> tuple[Session, Upstream, Fetch, Sources]:
    from relay.sources.polling import PollingSource
    from relay.sources.streaming import StreamingSource
    from relay.upstream import Upstream as HTTPSession

    main, http = config.main, config.http
    upstream = HTTPSession(
        proxy=config.proxy.url or None,
        ca_files=[Path(file) for file in config.proxy.ca_cert_files if file],
        keep_alive=0.0 if http.disable_keep_alives else http.idle_conn_timeout,
    )
    times = SourceTimings(poll_interval=main.poll_interval)

    def source(spec: EnvironmentSpec, log: Log) -> DataSource:
        if main.data_source == "polling":
            return PollingSource(upstream, main.base_uri, spec.sdk_key, times)
        return StreamingSource(upstream, main.stream_uri, spec.sdk_key, log, times)

    return upstream, upstream, upstream.fetch, source


def _forwarder(config: Config, upstream: Upstream, specs: Sequence[EnvironmentSpec]) -> Forwarder:
    """Return what delivers events: those of SDKs, if that is switched on, and our own."""
    from relay.events.spool import Spool

    events, drain = config.events, config.main.graceful_shutdown_timeout
    directory = Path(events.spool_dir) if events.spool_dir else None
    spool = Spool(directory, Limits(memory=events.capacity * POST_SIZE))
    pace = ForwarderTimings(
        flush_interval=max(events.flush_interval, SHORTEST_FLUSH), drain=drain / 4
    )
    by_name = {spec.name: spec for spec in specs}
    return Forwarder(spool, upstream, events.events_uri, by_name.get, pace)


def _spec(given: EnvironmentConfig, main: Main) -> EnvironmentSpec:
    return EnvironmentSpec(
        name=given.name,
        sdk_key=SDKKey(given.sdk_key.reveal()),
        mobile_key=MobileKey(given.mobile_key.reveal()) if given.mobile_key else None,
        environment_id=EnvironmentID(given.env_id) if given.env_id else None,
        project_key=given.proj_key,
        environment_key=given.env_key,
        secure_mode=given.secure_mode,
        eval_streams=main.eval_streams if given.eval_streams is None else given.eval_streams,
        ttl=given.ttl,
        allowed_origins=given.allowed_origin,
        allowed_headers=given.allowed_header,
        prefix=given.prefix,
        log_level=given.log_level or None,
    )


def _environment(config: Config, spec: EnvironmentSpec, sources: Sources) -> Environment:
    log = _log_of(spec)
    source = sources(spec, log)
    evaluations, main = ProgramCache(), config.main
    streams = client_side_channels(evaluations, main.ping_stream_jitter_time)
    hub = Hub({"all": AllFormat(), "flags": FlagsFormat()}, _stream_limits(main), streams)
    copies = tuple(_mirrors(config, spec, source, log))
    return Environment(spec, source, hub, log, copies, programs=evaluations)


def _log_of(spec: EnvironmentSpec) -> Log:
    if spec.log_level:
        set_environment_level(spec.name, spec.log_level)
    return environment_log(spec.name, spec.sdk_key.masked)


def _stream_limits(main: Main) -> StreamLimits:
    return StreamLimits(
        heartbeat_interval=main.heartbeat_interval,
        max_connection_time=main.max_client_connection_time,
        stall_timeout=main.client_stall_timeout,
    )


def _mirrors(
    config: Config, spec: EnvironmentSpec, source: DataSource, log: Log
) -> Iterator[Mirror]:
    """Yield the snapshot and the database, where these are configured."""
    if config.main.snapshot_dir and config.environments:
        from relay.stores.snapshot import SnapshotMirror

        yield SnapshotMirror(Path(config.main.snapshot_dir), spec.sdk_key, log)
    if config.redis:
        from relay.stores.mirror import ONCE, DatabaseMirror, MirrorTimings
        from relay.stores.redis.store import RedisStore

        store = RedisStore(config.redis, spec.prefix)
        log.info("Using Redis data store: %s with prefix: %s", store.server, store.prefix)
        times = ONCE if config.main.exit_always else MirrorTimings()
        yield DatabaseMirror(store, "redis", source.resync, log, times)
