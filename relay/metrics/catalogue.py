"""Catalogue of metrics: their names, labels, help and collectors."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from msgspec import Struct

from relay import __version__, clock
from relay.bigsegments.environment import BigSegments
from relay.config.schema import Prometheus
from relay.environment import ConnectionState, Environment
from relay.events.reports import EventCounts
from relay.fleet import FleetStatus, Role
from relay.model.item import Kind
from relay.model.metrics import Histogram, MetricValue
from relay.protocol.prometheus import COUNTER, GAUGE, HISTOGRAM, Metric, Row
from relay.relay import DirectoryChange, Relay
from relay.stores import StoreState, StoreStatus, statuses_of
from relay.streams.admission import Admission
from relay.telemetry import process
from relay.telemetry.log import lost_lines
from relay.telemetry.reloads import ReloadResult
from relay.telemetry.traffic import RequestLabels, RequestMetrics, label_value
from relay.telemetry.workers import WorkerStatus

UNCOUNTED_ROUTES = frozenset(("/mping",))
"""Routes that ld-relay leaves out of its `requests` metric (status 8.2)."""


PROTOCOLS = ("fdv1", "fdv2")

Rows = Iterable[Row]


class MetricsView(Struct, frozen=True):
    """Objects from which metrics are collected."""

    relay: Relay
    traffic: RequestMetrics

    @property
    def environments(self) -> Mapping[str, Environment]:
        """All environments by display name."""
        return self.relay.environments


Collector = Callable[[MetricsView], Rows]


def table() -> str:
    """Return the README's table of all metrics."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {_code_list(metric.labels)} | {metric.help} |"
        for metric in (*OWN, *ld_relay_metrics(Prometheus().prefix))
    ]
    return "\n".join(("| metric | type | labels | meaning |", "|---|---|---|---|", *rows, ""))


def _code_list(labels: Iterable[str]) -> str:
    return " ".join(f"`{label}`" for label in labels) or "–"


def _per_environment(read: Callable[[Environment], float | Histogram | None]) -> Collector:
    """Return a collector of one value for each environment that has it."""

    def rows(view: MetricsView) -> Iterator[Row]:
        for name, environment in view.environments.items():
            value = read(environment)
            if value is not None:
                yield (name,), value

    return rows


def _of_process(read: Callable[[], float | None]) -> Collector:
    """Return a collector of one value of the process, if it is known."""

    def rows(_view: MetricsView) -> Iterator[Row]:
        value = read()
        if value is not None:
            yield (), value

    return rows


def _sums(
    counts: Mapping[RequestLabels, MetricValue], labels: Callable[[RequestLabels], tuple[str, ...]]
) -> Rows:
    """Return the sums of the series with the same labels."""
    sums: Counter[tuple[str, ...]] = Counter()
    for series, count in counts.items():
        sums[labels(series)] += count.value
    return sums.items()


def _streams(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        for stream, number in environment.hub.streams.items():
            yield (name, stream), number


def _new_streams(view: MetricsView) -> Rows:
    return _sums(view.traffic.new_streams, lambda s: (s.environment, s.platform, s.route))


def _requests(view: MetricsView) -> Rows:
    return _sums(view.traffic.requests, lambda s: (s.environment, s.platform, s.route, s.method))


def _of_admission(
    own: Callable[[Admission], int], of_worker: Callable[[WorkerStatus], int]
) -> Collector:
    """Return a collector of one value of this process and its workers."""

    def rows(view: MetricsView) -> Rows:
        workers = view.relay.workers.values()
        return [((), own(view.relay.admission) + sum(map(of_worker, workers)))]

    return rows


def _data_age(environment: Environment) -> float | None:
    age = environment.connection.data_age
    return None if age is None else round(age, 3)


def _upstream_states(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        for state in ConnectionState:
            yield (name, state.value), int(environment.connection.state is state)


def _upstream_protocols(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        if environment.protocol:
            for protocol in PROTOCOLS:
                yield (name, protocol), int(environment.protocol == protocol)


def _store_statuses(view: MetricsView) -> Iterator[tuple[str, StoreStatus]]:
    for name, environment in view.environments.items():
        for status in statuses_of(environment.mirrors):
            yield name, status


def _publication_states(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        for status in statuses_of(environment.mirrors, documents=True):
            for state in StoreState:
                yield (name, status.server, state.value), int(status.state is state)


def _store_states(view: MetricsView) -> Iterator[Row]:
    for name, status in _store_statuses(view):
        for state in StoreState:
            yield (name, status.database, state.value), int(status.state is state)


def _unreadable_items(view: MetricsView) -> Iterator[Row]:
    for name, status in _store_statuses(view):
        yield (name, status.database), len(status.invalid)


def _of_big_segments(read: Callable[[BigSegments], float | None]) -> Collector:
    """Return a collector of one value for each environment that has had big segments."""

    def value(environment: Environment) -> float | None:
        big_segments = environment.big_segments
        return read(big_segments) if big_segments is not None and big_segments.in_use else None

    return _per_environment(value)


def _synchronisation_age(big_segments: BigSegments) -> float | None:
    return None if big_segments.age is None else round(big_segments.age, 3)


def _event_counts(read: Callable[[EventCounts], float]) -> Collector:
    """Return a collector of one event count for each environment, if events are forwarded."""

    def rows(view: MetricsView) -> Iterator[Row]:
        if view.relay.events is not None:
            for name in view.environments:
                yield (name,), read(view.relay.events.counts(name))

    return rows


def _oldest_events(view: MetricsView) -> Iterator[Row]:
    if view.relay.events is not None:
        for name in view.environments:
            oldest = view.relay.events.oldest(name)
            yield (name,), 0.0 if oldest is None else max(0.0, round(clock.now() - oldest, 3))


def _unusable(view: MetricsView) -> Iterator[Row]:
    if view.relay.events is not None:
        for name in view.environments:
            yield (name,), view.traffic.unusable[name]


def _discarded(view: MetricsView) -> Iterator[Row]:
    for name in view.environments:
        yield (name,), view.traffic.discarded[name]


def _spool_durable(view: MetricsView) -> Iterator[Row]:
    if view.relay.events is not None:
        yield (), int(view.relay.events.spool.durable)


def _answers(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        for side, answers in environment.answers.items():
            for (kind, reason), number in answers.numbers.items():
                yield (name, side, kind, reason), number.value


def _saved_bytes(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        for side, answers in environment.answers.items():
            yield (name, side), answers.saved.value


def _items(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        if environment.payload is not None:
            for kind in Kind:
                yield (name, kind.noun), len(environment.payload.all(kind))


def _environments(view: MetricsView) -> Rows:
    states = Counter(each.connection.state for each in view.environments.values())
    return [((state.value,), states[state]) for state in ConnectionState]


def _unusable_environments(view: MetricsView) -> Rows:
    return [((), len(view.relay.unusable))]


def _unusable_archive(view: MetricsView) -> Rows:
    return [((), int(view.relay.unusable_archive is not None))]


def _expiring_keys(view: MetricsView) -> Iterator[Row]:
    """Yield the time that is left to the key of each kind that expires next."""
    now = clock.now()
    for name, environment in view.environments.items():
        left: dict[str, float] = {}
        for credential, expires_at in environment.spec.credentials.items():
            if now < expires_at < left.get(credential.kind.value, math.inf):
                left[credential.kind.value] = expires_at
        for kind, expires_at in left.items():
            yield (name, kind), round(expires_at - now, 3)


def _directory_states(view: MetricsView) -> Iterator[Row]:
    if view.relay.auto_configuration is not None:
        current = view.relay.auto_configuration.connection.state
        for state in ConnectionState:
            yield (state.value,), int(current is state)


def _invalid_entries(view: MetricsView) -> Iterator[Row]:
    if view.relay.auto_configuration is not None:
        counts = Counter(kind for kind, _ in view.relay.auto_configuration.invalid_entries)
        for kind in ("environment", "filter"):
            yield (kind,), counts[kind]


def _directory_age(view: MetricsView) -> Iterator[Row]:
    if view.relay.auto_configuration is not None:
        age = view.relay.auto_configuration.connection.data_age
        if age is not None:
            yield (), round(age, 3)


def _directory_changes(view: MetricsView) -> Iterator[Row]:
    if view.relay.auto_configuration is not None:
        for change in DirectoryChange:
            yield (change.value,), view.relay.auto_configuration.changes[change]


def _reloads(view: MetricsView) -> Iterator[Row]:
    for result in ReloadResult:
        yield (result.value,), view.relay.reloads.results[result]


def _configuration_time(view: MetricsView) -> Rows:
    return [((), round(view.relay.reloads.last_success, 3))]


def _of_workers(read: Callable[[WorkerStatus], float | None]) -> Collector:
    """Return a collector of one value for each worker, if there are any."""

    def rows(view: MetricsView) -> Iterator[Row]:
        for number, worker in sorted(view.relay.workers.items()):
            value = read(worker)
            if value is not None:
                yield (str(number),), value

    return rows


def _of_fleet(value: Callable[[FleetStatus], float | None]) -> Collector:
    """Return a collector of one value per environment of a fleet."""

    def collect(view: MetricsView) -> Iterator[Row]:
        for name, environment in view.environments.items():
            if environment.fleet is not None:
                found = value(environment.fleet.status)
                if found is not None:
                    yield (name,), found

    return collect


def _fleet_roles(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        if environment.fleet is not None:
            for role in Role:
                yield (name, role.value), int(environment.fleet.status.role is role)


def _fleet_publications(view: MetricsView) -> Iterator[Row]:
    for name, environment in view.environments.items():
        if environment.fleet is not None:
            for outcome, count in environment.fleet.status.outcomes.items():
                yield (name, outcome), count


def _build_info(_view: MetricsView) -> Rows:
    return [((__version__, platform.python_version()), 1)]


OWN: Mapping[Metric, Collector] = {
    Metric("relay_streams", GAUGE, ("environment", "stream"), "Open streams."): _streams,
    Metric("relay_new_streams_total", COUNTER, ("environment", "platform", "route"), "Streams that were opened."): _new_streams,
    Metric("relay_streams_delayed", GAUGE, (), "Streams that wait for all data until others have read theirs."): _of_admission(lambda a: a.waiting, lambda w: w.delayed),
    Metric("relay_streams_unread_bytes", GAUGE, (), "Bytes of all data that are on their way to clients; `maxUnreadData` bounds them."): _of_admission(lambda a: a.unread, lambda w: w.unread),
    Metric("relay_streams_cut_total", COUNTER, (), "Streams that were closed because their clients did not read, while others waited for all data."): _of_admission(lambda a: a.cut, lambda w: w.cut),
    Metric("relay_requests_total", COUNTER, ("environment", "platform", "route", "method"), "Requests whose credential opened an environment, streams included."): _requests,
    Metric("relay_changes_total", COUNTER, ("environment",), "Messages of LaunchDarkly that changed something."): _per_environment(lambda e: e.changes),
    Metric("relay_change_delivery_seconds", HISTOGRAM, ("environment",), "Time from the arrival of a change until it was written to the last stream whose client keeps up."): _per_environment(lambda e: e.hub.delays),
    Metric("relay_data_age_seconds", GAUGE, ("environment",), "Time since LaunchDarkly last confirmed that the flags are current; also of a stored list; none if that is unknown."): _per_environment(_data_age),
    Metric("relay_upstream_state", GAUGE, ("environment", "state"), "How it stands with LaunchDarkly: 1 for the state that `/status` shows, 0 for the others."): _upstream_states,
    Metric("relay_upstream_protocol", GAUGE, ("environment", "protocol"), "1 for the protocol by which LaunchDarkly is followed at present, `fdv1` or `fdv2`; 0 for the other one, and for both in a follower of a fleet."): _upstream_protocols,
    Metric("relay_store_state", GAUGE, ("environment", "database", "state"), "How it stands with the database: 1 for the state that `/status` shows, 0 for the others."): _store_states,
    Metric("relay_publication_state", GAUGE, ("environment", "url", "state"), "How it stands with a published document: 1 for the state that `/status` shows, 0 for the others."): _publication_states,
    Metric("relay_store_unreadable_items", GAUGE, ("environment", "database"), "Items in the database that could not be read."): _unreadable_items,
    Metric("relay_big_segments_available", GAUGE, ("environment",), "1 if the members of big segments can be read from the database, 0 if not; none without big segments."): _of_big_segments(lambda b: int(b.status is not None and b.status.available)),
    Metric("relay_big_segments_age_seconds", GAUGE, ("environment",), "Time since it was last known that the database has all members of big segments; none before the first time."): _of_big_segments(_synchronisation_age),
    Metric("relay_big_segments_synchronizing", GAUGE, ("environment",), "1 if this relay is the one that brings big segments into the database, 0 if another one does."): _of_big_segments(lambda b: int(b.synchroniser.has_lease) if b.synchroniser else None),
    Metric("relay_big_segments_patches_total", COUNTER, ("environment",), "Patches of big segments that this relay has written; others may have been written by another one."): _of_big_segments(lambda b: b.synchroniser.applied if b.synchroniser else None),
    Metric("relay_big_segments_reads_total", COUNTER, ("environment",), "Contexts whose memberships in big segments were read from the database for evaluations."): _of_big_segments(lambda b: b.reads),
    Metric("relay_big_segments_failed_reads_total", COUNTER, ("environment",), "Contexts that were evaluated without their memberships, because the database was away."): _of_big_segments(lambda b: b.failed_reads),
    Metric("relay_fleet_role", GAUGE, ("environment", "role"), "Role in the fleet: 1 for `leader`, `follower` or `alone`, 0 for the others; none without a fleet."): _fleet_roles,
    Metric("relay_fleet_term", GAUGE, ("environment",), "Number of this relay's leadership; none unless it leads."): _of_fleet(lambda f: f.term),
    Metric("relay_fleet_role_changes_total", COUNTER, ("environment",), "Changes of the role."): _of_fleet(lambda f: f.changes_of_role),
    Metric("relay_fleet_leaderless_seconds", GAUGE, ("environment",), "For how long no relay is seen to lead; 0 while one does."): _of_fleet(lambda f: round(f.leaderless, 3)),
    Metric("relay_fleet_behind_publications", GAUGE, ("environment",), "Publications of the leader that this follower has not taken yet."): _of_fleet(lambda f: f.behind),
    Metric("relay_fleet_publications_total", COUNTER, ("environment", "outcome"), "Publications of this relay: `published`, `moved` if it had to look again first, `fenced` if another relay had been elected."): _fleet_publications,
    Metric("relay_fleet_snapshots_total", COUNTER, ("environment",), "Times that this relay has read where the feed stands, with all data if they were others."): _of_fleet(lambda f: f.snapshots),
    Metric("relay_transfers_total", COUNTER, ("environment", "side", "answer", "reason"), "Answers to SDKs that may name the state of their data, of the `server` or `client` side: `full`, `delta` or `none`, and why."): _answers,
    Metric("relay_transfers_saved_bytes_total", COUNTER, ("environment", "side"), "Bytes of flags and segments, or of evaluated flags, that these answers did not have to contain."): _saved_bytes,
    Metric("relay_journal_states", GAUGE, ("environment",), "States from which SDKs can be brought up to date without all data."): _per_environment(lambda e: e.journal.depth),
    Metric("relay_journal_barriers_total", COUNTER, ("environment",), "Changes after which all SDKs got everything, because an item went back in version or was created anew."): _per_environment(lambda e: e.journal.barriers),
    Metric("relay_items", GAUGE, ("environment", "kind"), "Flags and segments that are held, deleted ones included; none without data."): _items,
    Metric("relay_invalid_items", GAUGE, ("environment",), "Flags and segments of which LaunchDarkly's last version could not be used."): _per_environment(lambda e: len(e.invalid)),
    Metric("relay_rejected_total", COUNTER, ("environment",), "Messages and items of LaunchDarkly that could not be used."): _per_environment(lambda e: e.rejected),
    Metric("relay_event_payloads_received_total", COUNTER, ("environment",), "Posts of events that were accepted, duplicates included."): _event_counts(lambda c: c.received),
    Metric("relay_event_payloads_duplicate_total", COUNTER, ("environment",), "Payloads that an SDK had sent before, by their payload id."): _event_counts(lambda c: c.duplicates),
    Metric("relay_event_payloads_forwarded_total", COUNTER, ("environment",), "Payloads that LaunchDarkly has taken."): _event_counts(lambda c: c.forwarded),
    Metric("relay_event_requests_retried_total", COUNTER, ("environment",), "Requests to LaunchDarkly's events service that had to be repeated."): _event_counts(lambda c: c.retried),
    Metric("relay_event_payloads_quarantined_total", COUNTER, ("environment",), "Payloads that are no well-formed JSON, or that LaunchDarkly rejects while it takes others; kept aside."): _event_counts(lambda c: c.quarantined),
    Metric("relay_event_payloads_evicted_total", COUNTER, ("environment",), "Payloads that were given up for want of room, or as too old."): _event_counts(lambda c: c.evicted),
    Metric("relay_event_payloads_unusable_total", COUNTER, ("environment",), "Payloads that were no JSON array, and events of old schemas that were malformed: answered with 202, as by ld-relay, and dropped."): _unusable,
    Metric("relay_event_payloads_discarded_total", COUNTER, ("environment",), "Payloads that were accepted and dropped, because the flags come from a file."): _discarded,
    Metric("relay_event_payloads_waiting", GAUGE, ("environment",), "Payloads that wait for their delivery."): _event_counts(lambda c: c.waiting),
    Metric("relay_event_oldest_seconds", GAUGE, ("environment",), "How long the oldest of them has waited; 0 if none waits."): _oldest_events,
    Metric("relay_event_spool_durable", GAUGE, (), "1 if accepted events survive the end of the process, 0 if they wait in memory."): _spool_durable,
    Metric("relay_environments", GAUGE, ("state",), "Environments, by how it stands with LaunchDarkly."): _environments,
    Metric("relay_environments_unusable", GAUGE, (), "Environments that LaunchDarkly or the archive lists, but that cannot be served; `/status` says why."): _unusable_environments,
    Metric("relay_archive_unusable", GAUGE, (), "1 while the archive of offline mode is unusable, so that what was read before is served; 0 otherwise."): _unusable_archive,
    Metric("relay_key_expires_in_seconds", GAUGE, ("environment", "kind"), "Time until the next key expires; none if none does."): _expiring_keys,
    Metric("relay_autoconfig_state", GAUGE, ("state",), "How it stands with automatic configuration: 1 for the state that `/status` shows, 0 for the others."): _directory_states,
    Metric("relay_autoconfig_invalid_entries", GAUGE, ("kind",), "Environments and payload filters whose entry in LaunchDarkly's list cannot be used; `/status` says why."): _invalid_entries,
    Metric("relay_autoconfig_age_seconds", GAUGE, (), "Time since LaunchDarkly last confirmed the list of environments; none before the first time."): _directory_age,
    Metric("relay_autoconfig_changes_total", COUNTER, ("change",), "Environments that automatic configuration has added, changed or removed, and SDK keys that it has rotated."): _directory_changes,
    Metric("relay_reloads_total", COUNTER, ("result",), "Reloads of the configuration: `success`, or `failure`, after which nothing has changed."): _reloads,
    Metric("relay_configuration_time_seconds", GAUGE, (), "Unix time at which the configuration was last read without a problem."): _configuration_time,
    Metric("relay_log_lines_lost_total", COUNTER, (), "Log lines that were dropped because nobody took them."): _of_process(lost_lines),
    Metric("relay_worker_connected", GAUGE, ("worker",), "1 if a worker serves clients, 0 while it is replaced; none without workers."): _of_workers(lambda w: int(w.connected)),
    Metric("relay_worker_starts_total", COUNTER, ("worker",), "Processes that have been this worker."): _of_workers(lambda w: w.starts),
    Metric("relay_worker_age_seconds", GAUGE, ("worker",), "Time since the worker's process has connected."): _of_workers(lambda w: round(clock.unix() - w.since, 3)),
    Metric("relay_worker_streams", GAUGE, ("worker",), "Open streams of a worker."): _of_workers(lambda w: w.streams),
    Metric("relay_worker_cpu_seconds_total", COUNTER, ("worker",), "Processor time of all processes that have been this worker."): _of_workers(lambda w: w.cpu),
    Metric("relay_worker_resident_memory_bytes", GAUGE, ("worker",), "Memory of the worker's process, including what it shares with the others."): _of_workers(lambda w: w.resident),
    Metric("relay_worker_open_fds", GAUGE, ("worker",), "Open files and connections of the worker's process."): _of_workers(lambda w: w.files),
    Metric("relay_build_info", GAUGE, ("version", "python"), "Always 1."): _build_info,
    Metric("process_cpu_seconds_total", COUNTER, (), "Processor time of this process."): _of_process(process.cpu_seconds),
    Metric("process_resident_memory_bytes", GAUGE, (), "Memory of this process."): _of_process(process.resident_bytes),
    Metric("process_open_fds", GAUGE, (), "Open files and connections of this process."): _of_process(process.open_files),
    Metric("process_max_fds", GAUGE, (), "How many of them there may be."): _of_process(process.max_open_files),
    Metric("process_start_time_seconds", GAUGE, (), "Unix time of the start of this process."): _of_process(process.started),
}  # fmt: skip
"""Metrics of both ports. The last five have the names that Prometheus's client libraries use."""


def ld_relay_metrics(prefix: str) -> Mapping[Metric, Collector]:
    """Return ld-relay's metrics, with its names and help.

    Args:
        prefix: prefix of the names.
    """
    client = ("env", "platformCategory", "userAgent")
    request = ("env", "method", "platformCategory", "route", "userAgent")
    return {
        # ld-relay declares it as a counter, although it decreases.
        Metric(f"{prefix}_connections", GAUGE, client, "current number of connections"): _connections,
        Metric(f"{prefix}_newconnections", COUNTER, client, "total number of connections"): _new_connections,
        Metric(f"{prefix}_requests", COUNTER, request, "Number of hits to a route"): _request_hits,
    }  # fmt: skip


def _connections(view: MetricsView) -> Rows:
    return _sums(view.traffic.streams, partial(_client_labels, view))


def _new_connections(view: MetricsView) -> Rows:
    return _sums(view.traffic.new_streams, partial(_client_labels, view))


def _request_hits(view: MetricsView) -> Rows:
    counts = view.traffic.requests
    counted = {s: counts[s] for s in counts if s.route not in UNCOUNTED_ROUTES}
    return _sums(counted, partial(_hit_labels, view))


def _hit_labels(view: MetricsView, series: RequestLabels) -> tuple[str, ...]:
    environment, platform_, agent = _client_labels(view, series)
    return environment, series.method, platform_, label_value(series.route), agent


def _client_labels(view: MetricsView, series: RequestLabels) -> tuple[str, str, str]:
    spec = view.relay.registry.spec_of(series.environment)
    name = spec.title if spec else series.environment
    return label_value(name), series.platform, label_value(series.user_agent)
