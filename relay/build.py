"""Build a relay from a configuration: the only place that chooses implementations of its parts.

Imports are local, so that only what a configuration uses is loaded: a start with a flags file
imports neither the HTTP client nor the Redis driver.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from relay.config.schema import AutoConfig, Config, DynamoDB, EnvironmentConfig, Main, OfflineMode
from relay.environment import Environment
from relay.errors import ConfigError, UnusableArchive
from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings
from relay.events.sender import Upstream
from relay.events.store import Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.journal import Journal
from relay.model.reply import Fetch
from relay.programs import ProgramCache
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.registry import Registry
from relay.relay import Directory, Relay
from relay.sources import DataSource
from relay.sources.timings import SourceTimings
from relay.stores import DataStore, Mirror
from relay.stores.bigsegments import BigSegmentStore
from relay.streams.deltas import STREAM as DELTAS
from relay.streams.deltas import DeltaChannel
from relay.streams.evaluated import client_side_channels
from relay.streams.hub import Hub, StreamLimits
from relay.telemetry.log import Log, environment_log, set_environment_level

if TYPE_CHECKING:
    from relay.autoconfig import AutoConfiguration
    from relay.bigsegments.environment import BigSegments
    from relay.bigsegments.synchroniser import Synchroniser
    from relay.model.credential import AutoConfigKey
    from relay.protocol.environments import SharedSettings
    from relay.stores.documents.connect import Places
    from relay.stores.listmirror import ListMirror
    from relay.sync import SyncTarget
    from relay.upstream import Upstream as HTTPSession

DEMO = EnvironmentSpec(
    "demo", SDKKey("sdk-demo"), MobileKey("mob-demo"), EnvironmentID("demo-client-side-id")
)
"""The environment that serves a flags file, and its credentials."""

PAYLOAD_SIZE = 8 * 1024
"""Size in bytes of one unit of `[Events] capacity`: about forty events."""

MIN_FLUSH_INTERVAL = 0.01
"""Seconds; an interval of 0 would send one request per event payload."""

Session = AbstractAsyncContextManager[object]
SourceFactory = Callable[[EnvironmentSpec, Log], DataSource]


class Database(Struct, frozen=True):
    """A configured database.

    Args:
        kind: kind of database, as in `/status`.
        store_for: returns the store of an environment.
        has_tables: True if environments may have different tables.
        big_segments_for: returns the members of its big segments; None if it cannot hold any.
    """

    kind: str
    store_for: Callable[[EnvironmentSpec], DataStore]
    big_segments_for: Callable[[EnvironmentSpec], BigSegmentStore] | None = None
    has_tables: bool = False

    def table_of(self, spec: EnvironmentSpec) -> str:
        """Return the table of an environment; empty if the database has none."""
        return spec.table if self.has_tables else ""


class EnvironmentParts:
    """Makes environments, wherever they are listed, and what they need when they change.

    Args:
        config: of the environments.
        make_source: makes data sources, which share a session.
        databases: the configured ones.
        places: of documents.
        upstream: session for big segments; None without a network.
    """

    def __init__(
        self,
        config: Config,
        make_source: SourceFactory,
        databases: Sequence[Database],
        places: Places | None,
        upstream: HTTPSession | None,
    ) -> None:
        self._config = config
        self._make_source = make_source
        self._databases = databases
        self._places = places
        self._upstream = upstream

    def of(self, config: Config, *, databases: bool, documents: bool) -> EnvironmentParts:
        """Return what makes environments with another configuration, and the same sessions.

        Args:
            config: in which nothing else differs but environments and databases.
            databases: True if the databases differ.
            documents: True if the places of documents differ.

        Raises:
            ConfigError: a file, variable or library that these need is unusable.
        """
        those = _databases(config) if databases else self._databases
        places = _places(config) if documents else self._places
        return EnvironmentParts(config, self._make_source, those, places, self._upstream)

    @property
    def specs(self) -> Sequence[EnvironmentSpec]:
        """The specs of all environments."""
        return [_spec(each, self._config) for each in self._config.all_environments]

    def environment(self, spec: EnvironmentSpec) -> Environment:
        """Return a new environment; its big segments are fetched only if there is an upstream."""
        config, databases, places = self._config, self._databases, self._places
        main, upstream, log = config.main, self._upstream, _log_for(spec)
        source = self._make_source(spec, log)
        programs, journal = ProgramCache(), Journal(spec.lineage)
        big_segments = _big_segments(main, spec, log, databases)
        client_side = client_side_channels(programs, main.ping_stream_jitter_time, big_segments)
        channels = {DELTAS: DeltaChannel(journal), **client_side}
        hub = Hub({"all": AllFormat(), "flags": FlagsFormat()}, _stream_limits(main), channels)
        environment = Environment(
            spec, source, hub, log, programs=programs, journal=journal, big_segments=big_segments
        )
        if big_segments is not None and upstream is not None:
            store = big_segments.store
            big_segments.synchroniser = _synchroniser(
                big_segments, store, main, upstream, environment
            )
        resync = environment.resync
        environment.mirrors = (
            *_first_mirrors(config, spec, log, places),
            *_database_mirrors(config, spec, resync, log, databases),
            *_document_mirrors(config, spec, resync, log, places),
        )
        return environment

    def keeps(self, environment: Environment, spec: EnvironmentSpec, *, databases: bool) -> bool:
        """Return whether an environment can go on with another spec, or must be made anew.

        It must where big segments come, with the first database that can hold them, or go.
        """
        if not databases and not _moves(environment.spec, spec):
            return True
        has_any = _memberships(self._databases) is not None
        return has_any == (environment.big_segments is not None)

    def source(self, spec: EnvironmentSpec, log: Log) -> DataSource:
        """Return a new data source of an environment."""
        return self._make_source(spec, log)

    def mirrors(
        self, environment: Environment, spec: EnvironmentSpec, *, databases: bool, documents: bool
    ) -> Sequence[Mirror] | None:
        """Return the mirrors that an environment needs with another spec; None if they stay.

        A snapshot belongs to an SDK key, a document to a client-side ID, what a database has to a
        prefix and a table.

        Args:
            environment: with its former spec and mirrors.
            spec: its spec from now on.
            databases: True if the databases differ.
            documents: True if the places of documents differ.
        """
        before, config, log = environment.spec, self._config, environment.log
        resync, places = environment.resync, self._places
        first: list[Mirror] = []
        stores: list[Mirror] = []
        published: list[Mirror] = []
        for mirror in environment.mirrors:
            status = mirror.status
            of_kind = published if status and status.is_document else stores
            (of_kind if status else first).append(mirror)
        has_same_id = spec.environment_id == before.environment_id
        if spec.sdk_key != before.sdk_key or not has_same_id:
            first = list(_first_mirrors(config, spec, log, places))
        if databases or _moves(before, spec):
            stores = list(_database_mirrors(config, spec, resync, log, self._databases))
        if documents or not has_same_id:
            published = list(_document_mirrors(config, spec, resync, log, places))
        mirrors = (*first, *stores, *published)
        return None if mirrors == environment.mirrors else mirrors

    def memberships(
        self, environment: Environment, spec: EnvironmentSpec, *, databases: bool
    ) -> tuple[BigSegmentStore, Synchroniser | None] | None:
        """Return where big segments are from now on, and what fills it; None if they stay."""
        big_segments, store_for = environment.big_segments, _memberships(self._databases)
        stays = not databases and not _moves(environment.spec, spec)
        if stays or big_segments is None or store_for is None:
            return None
        store, main, upstream = store_for(spec), self._config.main, self._upstream
        if upstream is None:
            return store, None
        return store, _synchroniser(big_segments, store, main, upstream, environment)


def build(config: Config) -> Relay:
    """Return the relay that a configuration describes, without connecting anything.

    Raises:
        ConfigError: a resource that it names, such as a file of CA certificates, is unusable.
    """
    return build_with_parts(config)[0]


def build_with_parts(config: Config) -> tuple[Relay, EnvironmentParts | None]:
    """Return the relay, as `build`, and what makes further environments that are listed.

    That is None if the configuration lists none: the environments come from elsewhere.
    """
    registry: Registry[Environment] = Registry()
    databases = _databases(config)
    if config.offline_mode.file_data_source:
        return _offline(config, registry, databases), None
    events: Forwarder | None = None
    fetch: Fetch | None = None
    directory: Directory | None = None
    session: Session = nullcontext()
    upstream: HTTPSession | None = None
    if config.uses_launchdarkly:
        upstream, make_source = _launchdarkly(config)
        session, fetch = upstream, upstream.fetch
        events = _forwarder(config, upstream, registry.spec_of)
    else:
        make_source = _file(config)
    parts = EnvironmentParts(config, make_source, databases, _places(config), upstream)
    if upstream is not None and config.auto_config.key:
        directory = _auto_configuration(config, upstream, parts)
    specs = parts.specs if config.uses_launchdarkly else [_demo(config.main)]
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
    )
    return relay, parts if config.environments else None


def _auto_configuration(
    config: Config, session: HTTPSession, parts: EnvironmentParts
) -> AutoConfiguration:
    """Return what follows the list of environments; it makes them as the configured ones are."""
    from relay.autoconfig import AutoConfiguration, log
    from relay.model.credential import AutoConfigKey
    from relay.sources.autoconfig import AutoConfigStream

    main, auto = config.main, config.auto_config
    key = AutoConfigKey(auto.key.reveal())
    return AutoConfiguration(
        AutoConfigStream(session, main.stream_uri, key, log),
        _shared(auto, config),
        parts.environment,
        parts.source,
        tuple(_list_mirrors(config, key, log)),
    )


def _list_mirrors(config: Config, key: AutoConfigKey, log: Log) -> Iterator[ListMirror]:
    """Yield the places where the list of environments is stored, as configured."""
    from relay.stores.listmirror import ListMirror

    main, auto = config.main, config.auto_config
    if main.exit_always:
        return  # such a run waits for LaunchDarkly's list
    if main.snapshot_dir:
        from relay.stores.listfile import ListFile

        yield ListMirror(ListFile(Path(main.snapshot_dir), key), log)
    if config.redis and auto.cache_key:
        from relay.stores.redis.list import RedisList

        store = RedisList(config.redis, auto.cache_key, key, auto.cache_encryption_key)
        yield ListMirror(store, log)


def _offline(
    config: Config, registry: Registry[Environment], databases: Sequence[Database]
) -> Relay:
    """Return the relay whose environments are those of an archive: without a network.

    Raises:
        ConfigError: the archive is unusable.
    """
    from relay.offline import OfflineArchive

    options, main = config.offline_mode, config.main
    places = _places(config)

    def make_environment(spec: EnvironmentSpec, source: DataSource) -> Environment:
        parts = EnvironmentParts(config, lambda _spec, _log: source, databases, places, None)
        return parts.environment(spec)

    path = Path(options.file_data_source)
    interval = options.file_data_source_monitoring_interval
    archive = OfflineArchive(path, interval, _shared(options, config), make_environment)
    relay = Relay(
        [],
        main.init_timeout,
        disconnected_after=main.disconnected_status_time,
        registry=registry,
        directory=archive,
        stale_big_segments_degrade=main.big_segments_stale_as_degraded,
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
        options.env_datastore_table_name or _common_table(config),
    )


def _common_table(config: Config) -> str:
    return config.dynamodb.table_name if config.dynamodb else ""


def _demo(main: Main) -> EnvironmentSpec:
    return replace(DEMO, eval_streams=main.eval_streams)


def sync_targets(
    config: Config, names: Collection[str] = (), relay_url: str = "", to: str = ""
) -> tuple[Session, list[SyncTarget]]:
    """Return the upstream session and the sync targets: for each environment each destination.

    Args:
        config: configuration of LaunchDarkly, the database and the environments.
        names: names of the environments to sync; empty for all.
        relay_url: URL of a running relay to read from instead of LaunchDarkly.
        to: URL of the only place to publish documents in; empty for all that is configured.

    Raises:
        ConfigError: there is no destination, or no such environment; see also `build`.
    """
    from relay.stores import DOCUMENT, label_of
    from relay.sync import SyncTarget

    if to:
        config = structs.replace(config, publish=structs.replace(config.publish, to=(to,)))
    databases = () if to else _databases(config)
    places = _places(config)
    publish = config.publish
    problems = _missing(config, names)
    if not databases and not publish.to:
        text = "there is no database to bring up to date; USE_REDIS, USE_CONSUL or USE_DYNAMODB"
        text = f"{text} names one, and --to or PUBLISH_TO a place for documents"
        problems.append(text)
    problems += [
        f'environment "{each.name}" has no client-side ID (envId), which names its document'
        for each in config.all_environments
        if publish.to and not each.env_id and (not names or each.name in names)
    ]
    if problems:
        raise ConfigError(problems)
    session, sources = _sources(config, names, relay_url)
    targets: list[SyncTarget] = []
    for spec, make_source, log in sources:
        for number, each in enumerate(databases):
            store, kind, table = each.store_for(spec), each.kind, each.table_of(spec)
            label = label_of(kind, table or store.server) if number else ""
            targets.append(SyncTarget(spec, make_source(), store, log, kind, label, table))
        documents = places.stores(publish.to, publish.token, spec, log) if places else []
        targets += [
            SyncTarget(spec, make_source(), each, log, DOCUMENT, each.label) for each in documents
        ]
    return session, targets


def archive_sources(
    config: Config, names: Collection[str] = (), relay_url: str = ""
) -> tuple[Session, list[tuple[EnvironmentSpec, DataSource]]]:
    """Return the upstream session and the environments for an archive; arguments as above.

    Raises:
        ConfigError: an environment does not exist, or has no client-side ID or is filtered, which
            archives cannot hold; see also `build`.
    """
    problems = _missing(config, names)
    problems += [
        f'"{each.name}" is filtered, and archives hold whole environments only'
        for each in config.all_environments
        if each.filter_key and each.name in names
    ]
    problems += [
        f'environment "{each.name}" has no client-side ID (envId), which archives need'
        for each in config.environments
        if not each.env_id and not each.filter_key and (not names or each.name in names)
    ]
    if problems:
        raise ConfigError(problems)
    session, sources = _sources(config, names, relay_url)
    return session, [(spec, make()) for spec, make, _ in sources if not spec.payload_filter]


def _missing(config: Config, names: Collection[str]) -> list[str]:
    """Return problems with the environments that a command names."""
    known = [each.name for each in config.all_environments]
    problems = [f'there is no environment "{name}"' for name in names if name not in known]
    if not known:
        text = "there is no environment whose flags could be stored"
        if config.auto_config.key:
            text += "; those of automatic configuration are known to a running relay only"
        problems.append(text)
    return problems


def _sources(
    config: Config, names: Collection[str], relay_url: str
) -> tuple[Session, list[tuple[EnvironmentSpec, Callable[[], DataSource], Log]]]:
    """Return the upstream session, and the environments with what makes their sources."""
    if relay_url:
        main = structs.replace(config.main, data_source="polling", base_uri=relay_url)
        config = structs.replace(config, main=main)
    session, make_source = _launchdarkly(config)
    specs = [_spec(each, config) for each in config.all_environments]
    chosen = [(spec, _log_for(spec)) for spec in specs if not names or spec.name in names]
    return session, [(spec, partial(make_source, spec, log), log) for spec, log in chosen]


def _file(config: Config) -> SourceFactory:
    from relay.sources.file import FileSource

    path = Path(config.main.flags_file)
    return lambda _spec, _log: FileSource(path)


def _launchdarkly(config: Config) -> tuple[HTTPSession, SourceFactory]:
    from relay.sources.polling import PollingSource
    from relay.sources.streaming import StreamingSource

    main, upstream = config.main, _http_session(config)
    timings = SourceTimings(poll_interval=main.poll_interval)

    def make_source(spec: EnvironmentSpec, log: Log) -> DataSource:
        key, payload_filter = spec.sdk_key, spec.payload_filter
        if main.data_source == "polling":
            uri = main.base_uri
            return PollingSource(upstream, uri, key, timings, payload_filter=payload_filter)
        uri = main.stream_uri
        return StreamingSource(upstream, uri, key, log, timings, payload_filter=payload_filter)

    return upstream, make_source


def _http_session(config: Config) -> HTTPSession:
    from relay.upstream import Upstream as HTTPSession

    http = config.http
    return HTTPSession(
        proxy=config.proxy.url or None,
        ca_files=[Path(file) for file in config.proxy.ca_cert_files if file],
        keep_alive=0.0 if http.disable_keep_alives else http.idle_conn_timeout,
    )


def _places(config: Config) -> Places | None:
    """Return what makes the places for documents; None if there are no documents."""
    if not config.publish.to and not config.main.bootstrap_from:
        return None
    from relay.stores.documents.connect import Places

    urls = (*config.publish.to, *filter(None, [config.main.bootstrap_from]))
    return Places(lambda: _http_session(config), config.proxy.url, urls)


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


def _spec(options: EnvironmentConfig, config: Config) -> EnvironmentSpec:
    main = config.main
    return EnvironmentSpec(
        name=options.name,
        sdk_key=SDKKey(options.sdk_key.reveal()),
        mobile_key=MobileKey(options.mobile_key.reveal()) if options.mobile_key else None,
        environment_id=EnvironmentID(options.env_id) if options.env_id else None,
        project_key=options.proj_key,
        environment_key=options.env_key,
        secure_mode=options.secure_mode,
        eval_streams=main.eval_streams if options.eval_streams is None else options.eval_streams,
        ttl=options.ttl,
        allowed_origins=options.allowed_origin,
        allowed_headers=options.allowed_header,
        prefix=options.prefix,
        table=options.table_name or _common_table(config),
        log_level=options.log_level or None,
        payload_filter=options.filter_key,
    )


def _moves(before: EnvironmentSpec, after: EnvironmentSpec) -> bool:
    """Return whether an environment's place in the databases changes."""
    return (before.prefix, before.table) != (after.prefix, after.table)


def _memberships(
    databases: Sequence[Database],
) -> Callable[[EnvironmentSpec], BigSegmentStore] | None:
    """Return what makes stores of big segments, in the first database that can hold them."""
    return next(filter(None, (each.big_segments_for for each in databases)), None)


def _big_segments(
    main: Main, spec: EnvironmentSpec, log: Log, databases: Sequence[Database]
) -> BigSegments | None:
    """Return the big segments of an environment; None without a database that can hold them."""
    make_store = _memberships(databases)
    if make_store is None:
        return None
    from relay.bigsegments.environment import BigSegments, BigSegmentTimings

    timings = BigSegmentTimings(reported=main.big_segments_stale_threshold)
    return BigSegments(make_store(spec), log, timings)


def _synchroniser(
    big_segments: BigSegments,
    store: BigSegmentStore,
    main: Main,
    upstream: HTTPSession,
    environment: Environment,
) -> Synchroniser:
    """Return what fetches big segments from LaunchDarkly, with the present SDK key."""
    from relay.bigsegments.synchroniser import Synchroniser
    from relay.sources.bigsegments import BigSegmentSource

    def key() -> SDKKey:
        return environment.spec.sdk_key

    return Synchroniser(
        BigSegmentSource(upstream, main.base_uri, main.stream_uri, key),
        store,
        big_segments.changed,
        big_segments.look,
        environment.log,
    )


def _log_for(spec: EnvironmentSpec) -> Log:
    set_environment_level(spec.name, spec.log_level)
    return environment_log(spec.name, spec.sdk_key.masked)


def _stream_limits(main: Main) -> StreamLimits:
    return StreamLimits(
        heartbeat_interval=main.heartbeat_interval,
        max_connection_time=main.max_client_connection_time,
        stall_timeout=main.client_stall_timeout,
    )


def _databases(config: Config) -> tuple[Database, ...]:
    """Return the configured databases.

    Raises:
        ConfigError: a file or variable that one of them needs is unusable, or a library is missing.
    """
    databases = []
    if redis := config.redis:
        from relay.stores.redis.bigsegments import RedisBigSegmentStore
        from relay.stores.redis.store import RedisStore

        databases.append(
            Database(
                "redis",
                lambda spec: RedisStore(redis, spec.prefix),
                lambda spec: RedisBigSegmentStore(redis, spec.prefix),
            )
        )
    if consul := config.consul:
        from relay.stores.consul.connect import connect
        from relay.stores.consul.store import ConsulStore

        server, size = connect(consul, os.environ), consul.max_value_size
        databases.append(Database("consul", lambda spec: ConsulStore(server, spec.prefix, size)))
    if config.dynamodb:
        databases.append(_dynamodb(config.dynamodb))
    return tuple(databases)


def _dynamodb(options: DynamoDB) -> Database:
    try:
        from relay.stores.dynamodb.connect import DynamoDBConnection
        from relay.stores.dynamodb.store import DynamoDBStore
    except ImportError as e:
        text = "[DynamoDB] enabled: DynamoDB needs the libraries for AWS: pip install 'relay[aws]'"
        raise ConfigError([text]) from e
    connection = DynamoDBConnection(options.url, os.environ)

    def store_for(spec: EnvironmentSpec) -> DataStore:
        return DynamoDBStore(connection.lease(), spec.table, spec.prefix)

    return Database("dynamodb", store_for, has_tables=True)


def _first_mirrors(
    config: Config, spec: EnvironmentSpec, log: Log, places: Places | None
) -> Iterator[Mirror]:
    """Yield what an environment may start from: the snapshot, and a document, as configured."""
    main = config.main
    if main.snapshot_dir and config.uses_launchdarkly:
        from relay.stores.snapshot import SnapshotMirror

        # Keys rotate where LaunchDarkly names the environments; their data stay.
        owner = (config.auto_config.key and spec.environment_id) or spec.sdk_key
        yield SnapshotMirror(
            Path(main.snapshot_dir), owner, log, payload_filter=spec.payload_filter
        )
    if main.bootstrap_from and places and config.uses_launchdarkly:
        from relay.stores.documents.bootstrap import Bootstrap

        yield Bootstrap(places.place(main.bootstrap_from, main.bootstrap_token, spec), log)


def _database_mirrors(
    config: Config,
    spec: EnvironmentSpec,
    resync: Callable[[], None],
    log: Log,
    databases: Sequence[Database],
) -> Iterator[Mirror]:
    """Yield a mirror for each database, as configured."""
    if not databases:
        return
    from relay.stores import DATABASES
    from relay.stores.mirror import SINGLE_RUN, TIMINGS, DatabaseMirror, MirrorTimings

    for database in databases:
        kind, table, store = database.kind, database.table_of(spec), database.store_for(spec)
        text = "Using %s data store: %s with prefix: %s"
        log.info(text, DATABASES[kind], table or store.server, store.prefix)
        usual = TIMINGS.get(kind, MirrorTimings())
        timings = SINGLE_RUN if config.main.exit_always else usual
        yield DatabaseMirror(store, kind, resync, log, timings, table=table)


def _document_mirrors(
    config: Config,
    spec: EnvironmentSpec,
    resync: Callable[[], None],
    log: Log,
    places: Places | None,
) -> Iterator[Mirror]:
    """Yield the documents that are published, as configured."""
    main, publish = config.main, config.publish
    if places and publish.to:
        from relay.stores import DOCUMENT
        from relay.stores.documents.store import PUBLICATION
        from relay.stores.mirror import SINGLE_RUN, DatabaseMirror

        timings = SINGLE_RUN if main.exit_always else PUBLICATION
        for store in places.stores(publish.to, publish.token, spec, log):
            log.info("Publishing document %s at %s", store.prefix, store.server)
            yield DatabaseMirror(store, DOCUMENT, resync, log, timings, label=store.label)
