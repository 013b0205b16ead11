"""The relay of a configuration, with all that one process has once."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from relay.build.databases import Database, common_table, make_databases, make_places
from relay.build.environments import EnvironmentParts
from relay.build.fleet import make_member
from relay.build.sources import Session, from_file, from_launchdarkly, no_source
from relay.config.schema import AutoConfig, Config, OfflineMode
from relay.environment import Environment
from relay.errors import ConfigError, UnusableArchive
from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings
from relay.events.sender import Upstream
from relay.events.store import Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.reply import Fetch
from relay.registry import Registry
from relay.relay import Directory, Relay

if TYPE_CHECKING:
    from relay.autoconfig import AutoConfiguration
    from relay.model.credential import AutoConfigKey
    from relay.protocol.environments import SharedSettings
    from relay.stores.listmirror import ListStore
    from relay.upstream import Upstream as HTTPSession

DEMO = EnvironmentSpec(
    "demo", SDKKey("sdk-demo"), MobileKey("mob-demo"), EnvironmentID("demo-client-side-id")
)
"""The environment that serves a flags file, and its credentials."""

PAYLOAD_SIZE = 8 * 1024
"""Size in bytes of one unit of `[Events] capacity`: about forty events."""

MIN_FLUSH_INTERVAL = 0.01
"""Seconds; an interval of 0 would send one request per event payload."""


PartsFactory = type[EnvironmentParts]


def build(config: Config) -> Relay:
    """Return the relay that a configuration describes, without connecting anything.

    Raises:
        ConfigError: a resource that it names, such as a file of CA certificates, is unusable.
    """
    return build_with_parts(config)[0]


def build_with_parts(
    config: Config, make_parts: PartsFactory = EnvironmentParts
) -> tuple[Relay, EnvironmentParts | None]:
    """Return the relay, as `build`, and what makes further environments that are listed.

    That is None if the configuration lists none: the environments come from elsewhere.

    Args:
        config: of the relay.
        make_parts: class of what makes environments.
    """
    registry: Registry[Environment] = Registry()
    databases = make_databases(config)
    if config.offline_mode.file_data_source:
        return _offline(config, registry, databases, make_parts), None
    events: Forwarder | None = None
    fetch: Fetch | None = None
    directory: Directory | None = None
    session: Session = nullcontext()
    upstream: HTTPSession | None = None
    if config.uses_launchdarkly:
        upstream, make_source = from_launchdarkly(config)
        session, fetch = upstream, upstream.fetch
        events = _forwarder(config, upstream, registry.spec_of)
    else:
        make_source = from_file(config)
    member, places = make_member(config), make_places(config)
    parts = make_parts(config, make_source, databases, places, upstream, member=member)
    if upstream is not None and config.auto_config.key:
        directory = _auto_configuration(config, upstream, parts, databases)
    demo = replace(DEMO, eval_streams=config.main.eval_streams)
    specs = parts.specs if config.uses_launchdarkly else [demo]
    relay = Relay(
        [parts.environment(spec) for spec in specs],
        config.main.init_timeout,
        upstream=session,
        fetch=fetch,
        events=events,
        ignore_connection_errors=config.main.ignore_connection_errors,
        disconnected_after=config.main.disconnected_status_time,
        registry=registry,
        directory=directory,
        stale_big_segments_degrade=config.main.big_segments_stale_as_degraded,
        fdv1_fallback=config.main.fdv1_fallback,
        member=member,
        admission=parts.admission,
    )
    return relay, parts if config.environments else None


def _auto_configuration(
    config: Config, session: HTTPSession, parts: EnvironmentParts, databases: Sequence[Database]
) -> AutoConfiguration:
    """Return what follows the list of environments; it makes them as the configured ones are."""
    from relay.autoconfig import AutoConfiguration, log
    from relay.model.credential import AutoConfigKey
    from relay.sources.autoconfig import AutoConfigStream
    from relay.stores.listmirror import ListMirror

    main, auto = config.main, config.auto_config
    key = AutoConfigKey(auto.key.reveal())
    return AutoConfiguration(
        AutoConfigStream(session, main.stream_uri, key, log),
        _shared(auto, config),
        parts.environment,
        parts.source,
        [ListMirror(store, log) for store in _list_stores(config, key, databases)],
    )


def _list_stores(
    config: Config, key: AutoConfigKey, databases: Sequence[Database]
) -> Iterator[ListStore]:
    """Yield the places where the list of environments is stored, as configured."""
    main, auto = config.main, config.auto_config
    if main.exit_always:
        return  # such a run waits for LaunchDarkly's list
    if main.snapshot_dir:
        from relay.stores.listfile import ListFile

        yield ListFile(Path(main.snapshot_dir), key)
    for database in databases if auto.cache_key else ():
        if database.list_for is not None:
            yield database.list_for(auto)


def _offline(
    config: Config,
    registry: Registry[Environment],
    databases: Sequence[Database],
    make_parts: PartsFactory,
) -> Relay:
    """Return the relay whose environments are those of an archive: without a network.

    Raises:
        ConfigError: the archive is unusable.
    """
    from relay.offline import OfflineArchive

    options, main = config.offline_mode, config.main
    parts = make_parts(config, no_source, databases, make_places(config), None)
    path = Path(options.file_data_source)
    interval = options.file_data_source_monitoring_interval
    archive = OfflineArchive(path, interval, _shared(options, config), parts.environment)
    relay = Relay(
        [],
        main.init_timeout,
        disconnected_after=main.disconnected_status_time,
        registry=registry,
        directory=archive,
        stale_big_segments_degrade=main.big_segments_stale_as_degraded,
        fdv1_fallback=main.fdv1_fallback,
        admission=parts.admission,
    )
    try:
        archive.load(relay)
    except UnusableArchive as e:
        raise ConfigError([str(e)]) from e
    return relay


def _shared(options: AutoConfig | OfflineMode, config: Config) -> SharedSettings:
    """Return the settings that the configuration has for all environments of a directory."""
    from relay.protocol.environments import SharedSettings

    return SharedSettings(
        options.env_datastore_prefix,
        options.env_allowed_origin,
        options.env_allowed_header,
        config.main.eval_streams,
        options.env_datastore_table_name or common_table(config),
    )


def _forwarder(
    config: Config, upstream: Upstream, spec_of: Callable[[str], EnvironmentSpec | None]
) -> Forwarder:
    """Return the forwarder of events: those of SDKs, if enabled, and the relay's usage metrics."""
    from relay.events.spool import DiskSpool, MemorySpool

    events, drain = config.events, config.main.graceful_shutdown_timeout
    limits, directory = Limits(memory=events.capacity * PAYLOAD_SIZE), events.spool_dir
    spool = DiskSpool(Path(directory), limits) if directory else MemorySpool(limits)
    timings = ForwarderTimings(
        flush_interval=max(events.flush_interval, MIN_FLUSH_INTERVAL), drain=drain / 4
    )
    return Forwarder(spool, upstream, events.events_uri, spec_of, timings)
