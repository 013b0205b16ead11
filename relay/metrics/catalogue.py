"""The catalogue of metrics: one table of their names, labels, help and sources."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from relay import __version__, clock
from relay.config.schema import Prometheus
from relay.environment import ConnectionState, Environment
from relay.events.forwarder import EventCounts
from relay.model.item import Kind
from relay.model.metrics import Histogram, MetricValue
from relay.protocol.prometheus import COUNTER, GAUGE, HISTOGRAM, Metric, Row
from relay.relay import Relay
from relay.stores import StoreState, StoreStatus
from relay.telemetry import process
from relay.telemetry.log import lost_lines
from relay.telemetry.traffic import RequestMetrics, Series, label_value

UNCOUNTED_ROUTES = frozenset(("/mping",))
"""What the reference leaves out of its `requests` (status 8.2)."""


Rows = Iterable[Row]


@dataclass(frozen=True, slots=True)
class MetricsView:
    """What figures are taken from."""

    relay: Relay
    traffic: RequestMetrics

    @property
    def environments(self) -> Mapping[str, Environment]:
        """All environments by their display name."""
        return self.relay.environments


Collector = Callable[[MetricsView], Rows]


def table() -> str:
    """Return the table of the README: every figure there is."""
    rows = [
        f"| `{figure.name}` | {figure.kind} | {_listed(figure.labels)} | {figure.help} |"
        for figure in (*OWN, *reference(Prometheus().prefix))
    ]
    return "\n".join(("| figure | type | labels | meaning |", "|---|---|---|---|", *rows, ""))


def _listed(labels: Iterable[str]) -> str:
    return " ".join(f"`{label}`" for label in labels) or "–"


def _each(look: Callable[[Environment], float | Histogram | None]) -> Collector:
    """Return what takes one number of each environment that has it."""

    def rows(sight: MetricsView) -> Iterator[Row]:
        for name, environment in sight.environments.items():
            number = look(environment)
            if number is not None:
                yield (name,), number

    return rows


def _one(look: Callable[[], float | None]) -> Collector:
    """Return what takes a number of the whole process, if the system tells it."""

    def rows(_sight: MetricsView) -> Iterator[Row]:
        number = look()
        if number is not None:
            yield (), number

    return rows


def _sums(
    counts: Mapping[Series, MetricValue], labels: Callable[[Series], tuple[str, ...]]
) -> Rows:
    """Return the sums of all series that have the same labels."""
    sums: Counter[tuple[str, ...]] = Counter()
    for series, count in counts.items():
        sums[labels(series)] += count.value
    return sums.items()


def _streams(sight: MetricsView) -> Iterator[Row]:
    for name, environment in sight.environments.items():
        for stream, number in environment.hub.streams.items():
            yield (name, stream), number


def _new_streams(sight: MetricsView) -> Rows:
    return _sums(sight.traffic.new_streams, lambda s: (s.environment, s.platform, s.route))


def _requests(sight: MetricsView) -> Rows:
    return _sums(sight.traffic.requests, lambda s: (s.environment, s.platform, s.route, s.method))


def _data_age(environment: Environment) -> float | None:
    age = environment.connection.data_age
    return None if age is None else round(age, 3)


def _upstream_states(sight: MetricsView) -> Iterator[Row]:
    for name, environment in sight.environments.items():
        for state in ConnectionState:
            yield (name, state.value), int(environment.connection.state is state)


def _stores(sight: MetricsView) -> Iterator[tuple[str, StoreStatus]]:
    for name, environment in sight.environments.items():
        for copy in environment.mirrors:
            if copy.status is not None:
                yield name, copy.status


def _store_states(sight: MetricsView) -> Iterator[Row]:
    for name, status in _stores(sight):
        for state in StoreState:
            yield (name, status.database, state.value), int(status.state is state)


def _unreadable_items(sight: MetricsView) -> Iterator[Row]:
    for name, status in _stores(sight):
        yield (name, status.database), len(status.invalid)


def _events(look: Callable[[EventCounts], float]) -> Collector:
    """Return what takes one number of the events of each environment, where they are forwarded."""

    def rows(sight: MetricsView) -> Iterator[Row]:
        if sight.relay.events is not None:
            for name in sight.environments:
                yield (name,), look(sight.relay.events.counts(name))

    return rows


def _oldest_events(sight: MetricsView) -> Iterator[Row]:
    if sight.relay.events is not None:
        for name in sight.environments:
            oldest = sight.relay.events.oldest(name)
            yield (name,), 0.0 if oldest is None else max(0.0, round(clock.now() - oldest, 3))


def _unusable(sight: MetricsView) -> Iterator[Row]:
    if sight.relay.events is not None:
        for name in sight.environments:
            yield (name,), sight.traffic.unusable[name]


def _discarded(sight: MetricsView) -> Iterator[Row]:
    for name in sight.environments:
        yield (name,), sight.traffic.discarded[name]


def _spool_durable(sight: MetricsView) -> Iterator[Row]:
    if sight.relay.events is not None:
        yield (), int(sight.relay.events.spool.durable)


def _items(sight: MetricsView) -> Iterator[Row]:
    for name, environment in sight.environments.items():
        if environment.payload is not None:
            for kind in Kind:
                yield (name, kind.noun), len(environment.payload.all(kind))


def _build(_sight: MetricsView) -> Rows:
    return [((__version__, platform.python_version()), 1)]


OWN: Mapping[Metric, Collector] = {
    Metric("relay_streams", GAUGE, ("environment", "stream"), "Open streams."): _streams,
    Metric("relay_new_streams_total", COUNTER, ("environment", "platform", "route"), "Streams that were opened."): _new_streams,
    Metric("relay_requests_total", COUNTER, ("environment", "platform", "route", "method"), "Requests whose credential opened an environment, streams included."): _requests,
    Metric("relay_changes_total", COUNTER, ("environment",), "Messages of LaunchDarkly that changed something."): _each(lambda e: e.changes),
    Metric("relay_change_delivery_seconds", HISTOGRAM, ("environment",), "Time from the arrival of a change until it was written to the last stream whose client keeps up."): _each(lambda e: e.hub.delays),
    Metric("relay_data_age_seconds", GAUGE, ("environment",), "Time since LaunchDarkly last confirmed that the flags are current; none before the first time."): _each(_data_age),
    Metric("relay_upstream_state", GAUGE, ("environment", "state"), "How it stands with LaunchDarkly: 1 for the state that `/status` shows, 0 for the others."): _upstream_states,
    Metric("relay_store_state", GAUGE, ("environment", "database", "state"), "How it stands with the database: 1 for the state that `/status` shows, 0 for the others."): _store_states,
    Metric("relay_store_unreadable_items", GAUGE, ("environment", "database"), "Items in the database that could not be read."): _unreadable_items,
    Metric("relay_items", GAUGE, ("environment", "kind"), "Flags and segments that are held, deleted ones included; none without data."): _items,
    Metric("relay_invalid_items", GAUGE, ("environment",), "Flags and segments of which LaunchDarkly's last version could not be used."): _each(lambda e: len(e.invalid)),
    Metric("relay_rejected_total", COUNTER, ("environment",), "Messages and items of LaunchDarkly that could not be used."): _each(lambda e: e.rejected),
    Metric("relay_event_posts_received_total", COUNTER, ("environment",), "Posts of events that were accepted, duplicates included."): _events(lambda f: f.received),
    Metric("relay_event_posts_duplicate_total", COUNTER, ("environment",), "Posts that an SDK had sent before, by their payload id."): _events(lambda f: f.duplicates),
    Metric("relay_event_posts_forwarded_total", COUNTER, ("environment",), "Posts that LaunchDarkly has taken."): _events(lambda f: f.forwarded),
    Metric("relay_event_requests_retried_total", COUNTER, ("environment",), "Requests to LaunchDarkly's events service that had to be repeated."): _events(lambda f: f.retried),
    Metric("relay_event_posts_quarantined_total", COUNTER, ("environment",), "Posts that are no well-formed JSON, or that LaunchDarkly rejects while it takes others; kept aside."): _events(lambda f: f.quarantined),
    Metric("relay_event_posts_evicted_total", COUNTER, ("environment",), "Posts that were given up for want of room, or as too old."): _events(lambda f: f.evicted),
    Metric("relay_event_posts_unusable_total", COUNTER, ("environment",), "Posts that were no JSON array, and events of old schemas that were malformed: answered with 202, as by the reference, and dropped."): _unusable,
    Metric("relay_event_posts_discarded_total", COUNTER, ("environment",), "Posts that were accepted and dropped, because the flags come from a file."): _discarded,
    Metric("relay_event_posts_waiting", GAUGE, ("environment",), "Posts that wait for their delivery."): _events(lambda f: f.waiting),
    Metric("relay_event_oldest_seconds", GAUGE, ("environment",), "How long the oldest of them has waited; 0 if none waits."): _oldest_events,
    Metric("relay_event_spool_durable", GAUGE, (), "1 if accepted events survive the end of the process, 0 if they wait in memory."): _spool_durable,
    Metric("relay_log_lines_lost_total", COUNTER, (), "Log lines that were dropped because nobody took them."): _one(lost_lines),
    Metric("relay_build_info", GAUGE, ("version", "python"), "Always 1."): _build,
    Metric("process_cpu_seconds_total", COUNTER, (), "Processor time of this process."): _one(process.cpu_seconds),
    Metric("process_resident_memory_bytes", GAUGE, (), "Memory of this process."): _one(process.resident_bytes),
    Metric("process_open_fds", GAUGE, (), "Open files and connections of this process."): _one(process.open_files),
    Metric("process_max_fds", GAUGE, (), "How many of them there may be."): _one(process.max_open_files),
    Metric("process_start_time_seconds", GAUGE, (), "Unix time of the start of this process."): _one(process.started),
}  # fmt: skip
"""What both ports tell. The names of the last five are those of all programs."""


def reference(prefix: str) -> Mapping[Metric, Collector]:
    """Return what the reference tells, in its words.

    Args:
        prefix: beginning of the names.
    """
    client = ("env", "platformCategory", "userAgent")
    request = ("env", "method", "platformCategory", "route", "userAgent")
    return {
        # The reference calls it a counter, though it goes down.
        Metric(f"{prefix}_connections", GAUGE, client, "current number of connections"): _connections,
        Metric(f"{prefix}_newconnections", COUNTER, client, "total number of connections"): _new_connections,
        Metric(f"{prefix}_requests", COUNTER, request, "Number of hits to a route"): _hits,
    }  # fmt: skip


def _connections(sight: MetricsView) -> Rows:
    return _sums(sight.traffic.streams, _client)


def _new_connections(sight: MetricsView) -> Rows:
    return _sums(sight.traffic.new_streams, _client)


def _hits(sight: MetricsView) -> Rows:
    counts = sight.traffic.requests
    return _sums({s: counts[s] for s in counts if s.route not in UNCOUNTED_ROUTES}, _hit)


def _hit(series: Series) -> tuple[str, ...]:
    environment, platform_, agent = _client(series)
    return environment, series.method, platform_, label_value(series.route), agent


def _client(series: Series) -> tuple[str, str, str]:
    return label_value(series.environment), series.platform, label_value(series.user_agent)
