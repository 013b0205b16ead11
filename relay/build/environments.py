"""Environments with their parts, wherever they are listed."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.build.databases import Database, common_table, make_databases, make_places, memberships
from relay.build.fleet import fleet_mirror, fleet_source, fleet_source_of, join
from relay.build.sources import SourceFactory
from relay.config.schema import Config, EnvironmentConfig, Main
from relay.environment import Environment
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.journal import Journal
from relay.programs import ProgramCache
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.sources import DataSource
from relay.stores import Mirror
from relay.stores.bigsegments import BigSegmentStore
from relay.streams.admission import Admission
from relay.streams.channel import Channel, StreamFormat
from relay.streams.deltas import STREAM as DELTAS
from relay.streams.deltas import DeltaChannel
from relay.streams.evaluated import client_side_channels
from relay.streams.hub import Hub, StreamLimits
from relay.telemetry.log import Log, environment_log, set_environment_level

if TYPE_CHECKING:
    from relay.bigsegments.environment import BigSegments
    from relay.bigsegments.synchroniser import Synchroniser
    from relay.fleet.member import Member
    from relay.stores.documents.connect import Places
    from relay.upstream import Upstream as HTTPSession


class EnvironmentParts:
    """Makes environments, wherever they are listed, and what they need when they change.

    Args:
        config: of the environments.
        make_source: makes data sources, which share a session; is not called for environments that
            are made with a source.
        databases: the configured ones.
        places: of documents.
        upstream: session for big segments; None without a network.
        member: this relay in a fleet; None without one.
        admission: of the streams of all environments; a new one if omitted.
    """

    def __init__(
        self,
        config: Config,
        make_source: SourceFactory,
        databases: Sequence[Database],
        places: Places | None,
        upstream: HTTPSession | None,
        *,
        member: Member | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._member = member
        self.admission = admission or Admission(config.main.max_unread_data)
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
        those = make_databases(config) if databases else self._databases
        places = make_places(config) if documents else self._places
        return type(self)(
            config,
            self._make_source,
            those,
            places,
            self._upstream,
            member=self._member,
            admission=self.admission,
        )

    @property
    def specs(self) -> Sequence[EnvironmentSpec]:
        """The specs of all environments."""
        return [spec_of(each, self._config) for each in self._config.all_environments]

    def environment(self, spec: EnvironmentSpec, source: DataSource | None = None) -> Environment:
        """Return a new environment; its big segments are fetched only if there is an upstream.

        Args:
            spec: of the environment.
            source: of its data; made if omitted.
        """
        databases, log = self._databases, log_for(spec)
        main, upstream = self._config.main, self._upstream
        source = source or self._make_source(spec, log)
        journal = Journal(spec.lineage)
        programs = ProgramCache(journal)
        fleet = fleet_source(self._member, spec, source, log) if self._member else None
        big_segments = _big_segments(main, spec, log, databases)
        hub = self._hub(programs, journal, big_segments)
        environment = Environment(
            spec,
            fleet or source,
            hub,
            log,
            programs=programs,
            journal=journal,
            big_segments=big_segments,
        )
        if fleet is not None:
            join(environment, fleet)
        if big_segments is not None and upstream is not None:
            store = big_segments.store
            big_segments.synchroniser = _synchroniser(
                big_segments, store, main, upstream, environment
            )
        environment.mirrors = self._mirrors(environment)
        return environment

    def _hub(
        self, programs: ProgramCache, journal: Journal, big_segments: BigSegments | None
    ) -> Hub:
        """Return the hub of a new environment, of whose parts streams are made."""
        parts = hub_parts(self._config.main, programs, journal, big_segments)
        return Hub(*parts, admission=self.admission)

    def _mirrors(self, environment: Environment) -> tuple[Mirror, ...]:
        """Return all mirrors of a new environment."""
        config, spec, log, places = self._config, environment.spec, environment.log, self._places
        resync = environment.resync
        return (
            *_first_mirrors(config, spec, log, places, environment.journal),
            *self._database_mirrors(environment),
            *_document_mirrors(config, spec, resync, log, places),
        )

    def keeps(self, environment: Environment, spec: EnvironmentSpec, *, databases: bool) -> bool:
        """Return whether an environment can go on with another spec, or must be made anew.

        It must where big segments come, with the first database that can hold them, or go; and
        where its place in a fleet's Redis changes.
        """
        if not databases and not _moves(environment.spec, spec):
            return True
        if self._member is not None:
            return False
        has_any = memberships(self._databases) is not None
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
            first = list(_first_mirrors(config, spec, log, places, environment.journal))
        if databases or _moves(before, spec):
            made = (_database_mirror(config, spec, resync, log, each) for each in self._databases)
            stores = list(made)
        if documents or not has_same_id:
            published = list(_document_mirrors(config, spec, resync, log, places))
        mirrors = (*first, *stores, *published)
        return None if mirrors == environment.mirrors else mirrors

    def _database_mirrors(self, environment: Environment) -> Iterator[Mirror]:
        """Yield a mirror for each database of a new environment, as configured."""
        for database in self._databases:
            arguments = self._config, environment.spec, environment.resync, environment.log
            plain = partial(_database_mirror, *arguments, database)
            if self._member is not None and database.kind == "redis":
                server = database.store_for(environment.spec).server
                yield fleet_mirror(self._member, environment, plain, server=server)
            else:
                yield plain()

    def memberships(
        self, environment: Environment, spec: EnvironmentSpec, *, databases: bool
    ) -> tuple[BigSegmentStore, Synchroniser | None] | None:
        """Return where big segments are from now on, and what fills it; None if they stay."""
        big_segments, store_for = environment.big_segments, memberships(self._databases)
        stays = not databases and not _moves(environment.spec, spec)
        if stays or big_segments is None or store_for is None:
            return None
        store, main, upstream = store_for(spec), self._config.main, self._upstream
        if upstream is None:
            return store, None
        return store, _synchroniser(big_segments, store, main, upstream, environment)


def spec_of(options: EnvironmentConfig, config: Config) -> EnvironmentSpec:
    """Return the spec of a configured environment."""
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
        table=options.table_name or common_table(config),
        log_level=options.log_level or None,
        payload_filter=options.filter_key,
    )


def _moves(before: EnvironmentSpec, after: EnvironmentSpec) -> bool:
    """Return whether an environment's place in the databases changes."""
    return (before.prefix, before.table) != (after.prefix, after.table)


def _big_segments(
    main: Main, spec: EnvironmentSpec, log: Log, databases: Sequence[Database]
) -> BigSegments | None:
    """Return the big segments of an environment; None without a database that can hold them."""
    make_store = memberships(databases)
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
    from relay.bigsegments.lease import LeaderLease, StoreLease
    from relay.bigsegments.synchroniser import Synchroniser
    from relay.sources.bigsegments import BigSegmentSource

    def key() -> SDKKey:
        return environment.spec.sdk_key

    look, log = big_segments.look, environment.log
    in_store = StoreLease(store, look, log)
    source = fleet_source_of(environment)
    return Synchroniser(
        BigSegmentSource(upstream, main.base_uri, main.stream_uri, key),
        store,
        big_segments.changed,
        look,
        lease=LeaderLease(source, in_store, look, log) if source else in_store,
        log=log,
    )


def log_for(spec: EnvironmentSpec) -> Log:
    """Return the log of an environment, at the level that it names."""
    set_environment_level(spec.name, spec.log_level)
    return environment_log(spec.name, spec.sdk_key.masked)


def hub_parts(
    main: Main, programs: ProgramCache, journal: Journal, big_segments: BigSegments | None
) -> tuple[Mapping[str, StreamFormat], StreamLimits, Mapping[str, Channel[Any]]]:
    """Return the formats, limits and channels of a hub.

    Args:
        main: options of the relay.
        programs: of the environment.
        journal: of the environment.
        big_segments: of the environment; None without a database that has them.
    """
    formats: dict[str, StreamFormat] = {"all": AllFormat(), "flags": FlagsFormat()}
    limits = StreamLimits(
        heartbeat_interval=main.heartbeat_interval,
        max_connection_time=main.max_client_connection_time,
        stall_timeout=main.client_stall_timeout,
    )
    client_side = client_side_channels(programs, main.ping_stream_jitter_time, big_segments)
    return formats, limits, {DELTAS: DeltaChannel(journal), **client_side}


def _first_mirrors(
    config: Config, spec: EnvironmentSpec, log: Log, places: Places | None, journal: Journal
) -> Iterator[Mirror]:
    """Yield what an environment may start from: the snapshot, and a document, as configured."""
    main = config.main
    if main.snapshot_dir and config.uses_launchdarkly:
        from relay.stores.snapshot import SnapshotMirror

        # Keys rotate where LaunchDarkly names the environments; their data stay.
        owner = (config.auto_config.key and spec.environment_id) or spec.sdk_key
        directory, payload_filter = Path(main.snapshot_dir), spec.payload_filter
        yield SnapshotMirror(directory, owner, log, payload_filter=payload_filter, journal=journal)
    if main.bootstrap_from and places and config.uses_launchdarkly:
        from relay.stores.documents.bootstrap import Bootstrap

        yield Bootstrap(places.place(main.bootstrap_from, main.bootstrap_token, spec), log)


def _database_mirror(
    config: Config,
    spec: EnvironmentSpec,
    resync: Callable[[], None],
    log: Log,
    database: Database,
) -> Mirror:
    """Return the mirror of an environment in a database."""
    from relay.stores import DATABASES
    from relay.stores.mirror import SINGLE_RUN, TIMINGS, DatabaseMirror, MirrorTimings

    kind, table, store = database.kind, database.table_of(spec), database.store_for(spec)
    text = "Using %s data store: %s with prefix: %s"
    log.info(text, DATABASES[kind], table or store.server, store.prefix)
    usual = TIMINGS.get(kind, MirrorTimings())
    timings = SINGLE_RUN if config.main.exit_always else usual
    return DatabaseMirror(store, kind, resync, log, timings, table=table)


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
