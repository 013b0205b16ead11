"""Axes of the measurements, with their goals."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench import (
    admission,
    bigsegments,
    deltas,
    environments,
    evaluations,
    fleet,
    fleetload,
    measures,
    rotation,
    stores,
    twocores,
    webhook,
    workers,
)
from bench.databases import DATABASES
from bench.servers import Certificate, Server, Session
from bench.table import NGINX, PEER, Goal, Row, at_least, at_most

Measure = Callable[[Server, Certificate], measures.Measured]


@dataclass(frozen=True)
class Axis:
    """One thing to do with a server, and the figures that come of it."""

    name: str
    rows: tuple[Row, ...]
    measure: Measure
    on_nginx: bool = False


def axes(rotation_streams: int = rotation.STREAMS) -> list[Axis]:
    """All of them, in the order of the table; a key is rotated under so many streams."""
    return [
        _polls("2k", "2 KB", 5),
        _polls("100k", "100 KB", 20),
        _polls("570k", "570 KB", 30),
        _polls("2m", "2 MB", 6),
        _polls("2m-known", "2 MB known", 6),
        CONNECTIONS,
        _poll_variant("gzip", "gzip 570 KB", 100, measures.gzip_headers),
        _poll_variant("304", "304 on 570 KB", 200, measures.unchanged_headers),
        IDLE,
        _storm("2k", 3000, "2 KB", 0.6),
        _storm("100k", 2000, "100 KB", 0.2),
        _storm("2m", 300, "2 MB", 0.5),
        _storm("2m-known", 300, "2 MB known", 0.5),
        _unread("2m-known", 3000, "2 MB", encrypted=False),
        _unread("2m-known", 600, "2 MB", encrypted=True),
        _unread("20m", 300, "20 MB", encrypted=True),
        FAN_OUT,
        BURST,
        WORST_POLL,
        START,
        PUT,
        *(_tls_polls(*each) for each in (("2k", "2 KB"), ("570k", "570 KB"))),
        TLS_STREAMS,
        EVENTS,
        EVENTS_ROOM,
        EVENTS_CONNECTIONS,
        EVENTS_SPOOL,
        EVENTS_OUTAGE,
        _evaluations("eval-1000", "1000 flags", "new", 5),
        _evaluations("eval-1000", "1000 flags", "repeated", 25),
        _evaluations("eval-rules", "1000 flags, rule-heavy", "new", 5),
        _evaluations("eval-3", "3 flags", "new", 2),
        _evaluations("eval-3", "3 flags", "repeated", 5),
        CLIENT_PINGS,
        CLIENT_EVALUATING,
        CLIENT_CHANGE,
        CLIENT_RETURN,
        EVAL_WORST_POLL,
        _big_segments("new", 0.5),
        _big_segments("repeated", 0.8),
        MILLION,
        WEBHOOK,
        *map(_written, DATABASES),
        *(_idle_database(name, *each) for name, each in IDLE_GOALS.items()),
        ENVIRONMENTS,
        ENVIRONMENT_ADDED,
        _rotation(rotation_streams),
        ENVIRONMENT_POLLS,
        WORKERS,
        WORKERS_ROLLING,
        WORKERS_FEEDER,
        WORKERS_MEMORY,
        WORKERS_PATCH,
        *TWO_CORES,
        _fleet_of(3),
        _fleet_of(10),
        *FLEET,
        *DELTAS,
    ]


def _polls(dataset: str, label: str, times: float) -> Axis:
    figure = f"poll {label}"
    goals = (at_least(times, PEER), at_least(0.9, NGINX))
    measure = partial(measures.polls, figure, dataset, lambda _: {})
    return Axis(f"poll-{dataset}", _load_rows(figure, *goals), measure, on_nginx=True)


def _ended(_: Session) -> dict[str, str]:
    return measures.ENDED


def _poll_variant(
    name: str, figure: str, times: float, headers: Callable[[Session], dict[str, str]]
) -> Axis:
    measure = partial(measures.polls, figure, "570k", headers)
    return Axis(f"poll-{name}", _load_rows(figure, at_least(times, PEER)), measure, on_nginx=True)


def _evaluations(dataset: str, label: str, contexts: str, times: float) -> Axis:
    figure = f"evaluate {label}, {CONTEXTS[contexts][0]}"
    measure = partial(evaluations.evaluate, figure, dataset, CONTEXTS[contexts][1])
    return Axis(f"{dataset}-{contexts}", _load_rows(figure, at_least(times, PEER)), measure)


def _big_segments(contexts: str, share: float) -> Axis:
    figure = f"evaluate 1000 flags, 50 with big segments, {CONTEXTS[contexts][0]}"
    rows = (
        Row(figure, "req/cpu-s"),
        Row(f"{figure}, in those with listed members", "×", (Goal(share, least=True),)),
    )
    measure = partial(bigsegments.evaluate, figure, CONTEXTS[contexts][1])
    return Axis(f"big-segments-{contexts}", rows, measure)


def _tls_polls(dataset: str, label: str) -> Axis:
    figure = f"TLS poll {label}"
    measure = partial(measures.polls, figure, dataset, lambda _: {}, tls=True)
    return Axis(f"tls-poll-{dataset}", _load_rows(figure), measure, on_nginx=True)


def _rotation(streams: int) -> Axis:
    rows = (
        Row("rotation: answers that are not 200", "polls", (at_most(0),)),
        Row("rotation: streams of the new key that were cut", "streams", (at_most(0),)),
        Row("rotation: streams of the old key that ended", "%"),
        Row("rotation: polls", "req/s"),
    )
    return Axis("rotation", rows, partial(rotation.rotate, streams))


def _written(name: str) -> Axis:
    patch = f"one patch → readable: {name}"
    beyond = f"{patch}, beyond a write and a read"
    rows = (
        Row(f"put of 1000 flags written: {name}", "ms"),
        Row(f"{patch}, p50", "ms"),
        Row(f"{patch}, p99", "ms"),
        Row(f"{name}: a write and a read, p50", "ms"),
        Row(f"{name}: a write and a read, p99", "ms"),
        Row(f"{beyond}, p50", "ms", (at_most(10),)),
        Row(f"{beyond}, p99", "ms", (at_most(10),)),
    )
    return Axis(f"stored-{_dashed(name)}", rows, partial(stores.written, name))


def _dashed(name: str) -> str:
    return name.lower().replace(" ", "-")


def _idle_database(name: str, unit: str, most: float) -> Axis:
    row = Row(f"idle, per environment and hour: {name}", unit, (at_most(most),))
    return Axis(f"idle-{_dashed(name)}", (row,), partial(stores.idle, name))


def _load_rows(figure: str, *goals: Goal) -> tuple[Row, ...]:
    return (
        Row(figure, "req/cpu-s", goals),
        Row(f"{figure}: wall", "req/s"),
        Row(f"{figure}: p99", "ms"),
    )


def _fleet_of(members: int) -> Axis:
    label = f"fleet of {members}"
    behind = f"{label}: last replica behind upstream"
    rows = (
        Row(f"{label}: connections upstream", "", (at_most(1),)),
        Row(f"{label}: more of them at a change of leader", "ms", (at_most(1000),)),
        Row(f"{behind}, p50", "ms"),
        Row(f"{behind}, p99", "ms", (at_most(50),)),
        Row(f"{behind}, worst", "ms", (at_most(250),)),
    )
    return Axis(f"fleet-{members}", rows, partial(fleet.connections, members))


def _lost_redis(fault: str) -> tuple[Row, ...]:
    return (
        Row(f"{fault}: a change at the leader's clients", "s", (at_most(1),)),
        Row(f"{fault}: a change at those of others", "s", (at_most(5),)),
        Row(f"{fault}, then back: a change", "s", (at_most(1),)),
        Row(f"{fault}, then back: until one connection upstream", "s", (at_most(5),)),
    )


def _both_rows(figure: str, times: float, share: float) -> tuple[Row, ...]:
    return (
        Row(figure, "req/cpu-s", (at_least(times, PEER),)),
        Row(f"{figure}: wall", "req/s", (at_least(1, PEER),)),
        Row(f"{figure}, {twocores.OF_ONE}", "×", (Goal(share, least=True),)),
        Row(f"{figure}: wall, {twocores.OF_ONE}", "×"),
    )


def _storm(dataset: str, clients: int, label: str, times: float) -> Axis:
    figure = f"storm {clients} × {label}"
    rows = (
        Row(f"{figure}: last client", "s", (at_most(times, PEER),)),
        Row(f"{figure}: peak memory", "MB", (at_most(90),)),
    )
    return Axis(f"storm-{dataset}", rows, partial(measures.storm, figure, dataset, clients))


def _unread(dataset: str, clients: int, label: str, *, encrypted: bool) -> Axis:
    figure = f"{clients} clients that do not read {label}{' over TLS' if encrypted else ''}"
    rows = (
        Row(f"{figure}: last client that reads", "s", (at_most(0.5, PEER),)),
        Row(f"{figure}: peak memory", "MB", (at_most(400),)),
        Row(f"{figure}: unread in the kernel", "MB", (at_most(400),)),
        Row(f"{figure}: worst poll", "ms", (at_most(0.5, PEER),)),
        Row(f"{figure}: worst /status", "ms", (at_most(0.5, PEER),)),
    )
    name = f"admission-{dataset}{'-tls' if encrypted else ''}"
    measure = partial(admission.unread, figure, dataset, clients, encrypted=encrypted)
    return Axis(name, rows, measure)


CONNECTIONS = Axis(
    "connections",
    _load_rows("poll 2 KB on a new connection", at_least(2, PEER)),
    partial(measures.polls, "poll 2 KB on a new connection", "2k", _ended),
    on_nginx=True,
)
IDLE = Axis(
    "idle",
    (
        Row("idle stream", "KB", (at_most(2),)),
        Row("process with 15,000 idle streams", "MB", (at_most(110),)),
        Row("accepting 15,000 streams", "cpu-s"),
    ),
    measures.idle,
)
FAN_OUT = Axis(
    "fan-out",
    (
        Row("one patch to 15,000 streams: last client", "ms", (at_most(0.75, PEER),)),
        Row("one patch to 15,000 streams: CPU per message", "µs", (at_most(0.75, PEER),)),
    ),
    measures.fan_out,
)
BURST = Axis(
    "burst",
    (Row("50 patches at once × 3000 streams: last client", "ms", (at_most(0.1, PEER),)),),
    measures.burst,
)
WORST_POLL = Axis(
    "worst-poll",
    (Row("worst small poll during a patch to 10,000 streams", "ms", (at_most(15),)),),
    measures.worst_poll,
)
START = Axis(
    "start",
    (
        Row("exec → first 200", "ms", (at_most(300),)),
        Row("exec → first 200: CPU", "ms"),
        Row("exec → 570 KB served", "ms"),
    ),
    measures.start,
)
PUT = Axis("put", (Row("put of 2 MB → served", "ms", (at_most(1, PEER),)),), measures.put)
TLS_STREAMS = Axis(
    "tls-streams",
    (
        Row("TLS idle stream", "KB"),
        Row("TLS one patch to 3000 streams: last client", "ms"),
        Row("TLS one patch to 3000 streams: CPU per message", "µs"),
    ),
    measures.tls_streams,
)
DEFAULT_CAPACITY = 1000
"""Events (reference) or posts (ours) that may wait in memory unless told otherwise."""
ROOM_FOR_ALL = 3_000_000
"""More than can be posted in one flush interval: a relay that drops what is over has room."""
SINGLE = "posts of 43 events, each on a new connection"
ROOMY = "posts of 43 events, room for all"
POSTS, SPOOLED = "posts of 43 events", "posts of 43 events, on disk"
EVENTS = Axis(
    "events-post",
    (
        *_load_rows(POSTS, at_least(3, PEER)),
        Row(f"{POSTS}: peak memory", "MB", (at_most(90),)),
        Row(f"{POSTS}: p50", "ms"),
        Row(f"{POSTS}: arrived", "%"),
        Row(f"{POSTS}: with delivery", "posts/cpu-s"),
    ),
    partial(measures.post_events, POSTS, DEFAULT_CAPACITY),
)
EVENTS_ROOM = Axis(
    "events-room",
    (
        *_load_rows(ROOMY),
        Row(f"{ROOMY}: peak memory", "MB"),
        Row(f"{ROOMY}: p50", "ms"),
        Row(f"{ROOMY}: arrived", "%"),
        Row(f"{ROOMY}: with delivery", "posts/cpu-s"),
    ),
    partial(measures.post_events, ROOMY, ROOM_FOR_ALL),
)
EVENTS_CONNECTIONS = Axis(
    "events-connections",
    (
        *_load_rows(SINGLE, at_least(1, PEER)),
        Row(f"{SINGLE}: peak memory", "MB"),
        Row(f"{SINGLE}: p50", "ms"),
        Row(f"{SINGLE}: arrived", "%"),
        Row(f"{SINGLE}: with delivery", "posts/cpu-s"),
    ),
    partial(measures.post_events, SINGLE, DEFAULT_CAPACITY, ended=True),
)
EVENTS_SPOOL = Axis(
    "events-spool",
    (
        *_load_rows(SPOOLED, at_least(1, PEER)),
        Row(f"{SPOOLED}: p50", "ms"),
        Row(f"{SPOOLED}: peak memory", "MB"),
        Row(f"{SPOOLED}: one client, p50", "ms"),
        Row(f"{SPOOLED}: one client, p99", "ms"),
        Row("7 KB written and synchronised: p50", "ms"),
        Row("7 KB written and synchronised: p99", "ms"),
    ),
    partial(measures.post_events_to_disk, SPOOLED),
)
EVENTS_OUTAGE = Axis(
    "events-outage",
    (
        Row("outage: posts lost", "posts", (at_most(0),)),
        Row("outage: memory growth", "MB", (at_most(50),)),
        Row("outage: upstream back → all there", "s", (at_most(30),)),
        Row("outage: posts taken", "posts/s"),
        Row("outage: time to 202, p99", "ms"),
    ),
    measures.events_outage,
)
CONTEXTS = {
    "new": ("new contexts", evaluations.NEW),
    "repeated": (f"{evaluations.REPEATED} contexts", evaluations.REPEATED),
}
CLIENT_PINGS = Axis(
    "client-idle-pings",
    (Row("idle client stream, pings", "KB", (at_most(3),)),),
    evaluations.idle_pings,
)
CLIENT_EVALUATING = Axis(
    "client-idle-evaluating",
    (Row("idle client stream, evaluating", "KB", (at_most(5),)),),
    evaluations.idle_evaluating,
)
CHANGED = f"{evaluations.VIEWERS} client streams, one flag changes"
CHANGED_PINGS = f"{evaluations.VIEWERS} client streams, pings, one flag changes"
CLIENT_CHANGE = Axis(
    "client-change",
    (
        Row(f"{CHANGED}: last client", "s", (at_most(0.2, PEER),)),
        Row(f"{CHANGED}: CPU", "cpu-s", (at_most(0.2, PEER),)),
        Row(f"{CHANGED_PINGS}: last client", "s"),
        Row(f"{CHANGED_PINGS}: CPU", "cpu-s"),
    ),
    evaluations.change,
)
CLIENT_RETURN = Axis(
    "client-return",
    (
        Row(evaluations.RETURN_WHOLE, "×", (Goal(0.1, least=False),)),
        Row(evaluations.RETURN_ANSWERS, "×"),
        Row(f"{evaluations.RETURN}: last client", "s"),
        Row(f"{evaluations.RETURN}: CPU", "cpu-s"),
        Row(f"{evaluations.RETURN_UNCHANGED}: last client", "s"),
        Row(f"{evaluations.RETURN_UNCHANGED}: CPU", "cpu-s"),
        Row(f"{evaluations.RETURN_FULL}: last client", "s"),
        Row(f"{evaluations.RETURN_FULL}: CPU", "cpu-s"),
    ),
    evaluations.come_back,
)
EVAL_WORST_POLL = Axis(
    "eval-worst-poll",
    (
        Row("worst small poll beside evaluations of 1000 flags", "ms", (at_most(15),)),
        Row("worst small poll after a put of 1000 flags beside them", "ms", (at_most(15),)),
    ),
    evaluations.worst_poll,
)
IDLE_GOALS = {
    "Redis": ("commands", 2000),
    "Redis Cluster": ("commands", 2000),
    "DynamoDB": ("requests", 120),
}
"""Most that a relay may ask of a database while nothing happens; see `stores.IDLE_SECONDS`."""
MILLION = Axis(
    "big-segments-million",
    (
        Row("a million members: time", "s"),
        Row("a million members: CPU", "cpu-s"),
        Row("a million members: memory growth", "MB", (at_most(50),)),
        Row("a million members: worst small poll", "ms", (at_most(15),)),
        Row("a million members: p99.9 of small polls", "ms"),
        Row("a million members: worst small poll before", "ms"),
    ),
    bigsegments.million,
)
BEYOND = "webhook → Redis beyond upstream's latency"
WEBHOOK = Axis(
    "webhook",
    (
        Row(f"{BEYOND}: worst of {webhook.CHANGES}", "ms", (at_most(300),)),
        Row(f"{BEYOND}: p50", "ms"),
    ),
    webhook.webhook,
)
ENDED_WORKERS = "4 workers end, one by one"
WORKERS = Axis(
    "workers-deaths",
    (
        Row("4 workers: connections upstream", "", (at_most(1),)),
        Row(f"{workers.STREAMS} streams on 4 workers: most by fewest", "×", (at_most(1.25),)),
        Row("a worker dies: until it is replaced", "ms", (at_most(100),)),
        Row("a worker dies: until it is replaced, in a start of a relay", "×", (at_most(0.333),)),
        Row("a worker dies: failed new connections", "", (at_most(0),)),
        Row("a worker dies: worst answer", "ms", (at_most(1000),)),
    ),
    workers.workers,
)
WORKERS_ROLLING = Axis(
    "workers-rolling",
    (
        Row(f"{ENDED_WORKERS}: until all are replaced", "ms"),
        Row(f"{ENDED_WORKERS}: failed new connections", "", (at_most(0),)),
        Row(f"{ENDED_WORKERS}: worst answer", "ms", (at_most(1000),)),
    ),
    workers.rolling,
)
WORKERS_FEEDER = Axis(
    "workers-feeder",
    (
        Row("the feeder dies: until it is replaced", "ms", (at_most(1000),)),
        Row("the feeder dies: failed new connections", "", (at_most(0),)),
        Row("the feeder dies: worst answer", "ms"),
        Row("the feeder dies: streams that end", "", (at_most(0),)),
        Row("the feeder dies: posts lost", "", (at_most(0),)),
        Row("the feeder dies: posts delivered twice", "", (at_most(0),)),
        Row("the feeder dies: counters that go back", "", (at_most(0),)),
    ),
    workers.feeder,
)
WORKERS_MEMORY = Axis(
    "workers-memory",
    (
        Row("one worker more, 2 KB: memory", "MB", (at_most(12),)),
        Row("one worker more, 2 MB: memory", "MB", (at_most(20),)),
        Row("4 workers, 2 KB: memory, in that of 4 relays", "×", (at_most(0.75),)),
        Row("4 workers, 2 MB: memory, in that of 4 relays", "×"),
    ),
    workers.memory,
)
WORKERS_PATCH = Axis(
    "workers-patch",
    (
        Row("patch through feeder and worker, beyond one process", "ms", (at_most(1),)),
        Row("patch through feeder and worker", "ms"),
    ),
    workers.patch,
)
BOTH_PATCH, BOTH_POSTS = twocores.PATCH, twocores.POSTED
OF_ONE = twocores.OF_ONE
TWO_CORES = (
    Axis(
        "workers-fan-out",
        (
            Row(f"{BOTH_PATCH}: last write", "ms", (at_most(0.75, PEER),)),
            Row(f"{BOTH_PATCH}: CPU per message", "µs", (at_most(0.75, PEER),)),
            Row(f"{BOTH_PATCH}: last write, {OF_ONE}", "×", (at_most(0.65),)),
            Row(f"{BOTH_PATCH}: CPU per message, {OF_ONE}", "×", (at_most(1.1),)),
            Row(f"{BOTH_PATCH}: CPU of the busiest process, {OF_ONE}", "×"),
        ),
        twocores.fan_out,
    ),
    Axis(
        "workers-churn",
        (
            Row(f"{twocores.CHURNED}: p99 of a patch", "ms", (at_most(200),)),
            Row(f"{twocores.CHURNED}: worst of a patch", "ms"),
        ),
        twocores.churn,
    ),
    Axis("workers-eval", _both_rows(twocores.EVALUATED, 5, 0.9), twocores.evaluate),
    Axis("workers-polls", _both_rows(twocores.POLLED, 5, 0.8), twocores.polls),
    Axis(
        "workers-events",
        (
            Row(BOTH_POSTS, "req/cpu-s", (at_least(1, PEER),)),
            Row(f"{BOTH_POSTS}: wall", "req/s", (at_least(1, PEER),)),
            Row(f"{BOTH_POSTS}: p99", "ms"),
            Row(f"{BOTH_POSTS}, {OF_ONE}", "×"),
            Row(f"{BOTH_POSTS}: peak memory", "MB"),
            Row(f"{BOTH_POSTS}: p50", "ms"),
            Row(f"{BOTH_POSTS}: arrived", "%"),
            Row(f"{BOTH_POSTS}: with delivery", "posts/cpu-s"),
        ),
        partial(twocores.post_events, DEFAULT_CAPACITY),
    ),
)
FLEET_CHANGES = f"{fleetload.LABEL}, {fleetload.CHANGES} changes/s"
FLEET = (
    Axis(
        "fleet-failover",
        (
            *(
                row
                for fault in (fleet.KILLED, fleet.STOPPED)
                for row in (
                    Row(f"{fault}: next change everywhere, median", "s", (at_most(4),)),
                    Row(f"{fault}: next change everywhere, worst", "s", (at_most(5),)),
                )
            ),
            Row("leaders killed and stopped: clients that went back", "", (at_most(0),)),
            Row("figures of a fleet that are missing", "", (at_most(0),)),
        ),
        fleet.failover,
    ),
    Axis(
        "fleet-redis",
        (
            *_lost_redis(fleet.REDIS_STOPPED),
            *_lost_redis(fleet.REDIS_KILLED),
            Row(f"{fleet.REDIS_EMPTIED}: a change", "s", (at_most(1),)),
            Row("Redis lost: clients that went back", "", (at_most(0),)),
        ),
        fleet.redis,
    ),
    Axis(
        "fleet-chaos",
        (
            Row(f"{fleet.CHAOS}: breaks in the feed", "", (at_most(0),)),
            Row(f"{fleet.CHAOS}: clients that went back", "", (at_most(0),)),
            Row(f"{fleet.CHAOS}: relays that are not current", "", (at_most(0),)),
            Row(f"{fleet.CHAOS}: connections that began with older data", ""),
            Row(f"{fleet.CHAOS}: faults", ""),
            Row(f"{fleet.CHAOS}: terms", ""),
        ),
        fleet.chaos,
    ),
    Axis(
        "fleet-start",
        (
            Row(fleet.FOLLOWER, "ms"),
            Row(f"{fleet.FOLLOWER}, beyond 2 KB", "ms", (at_most(50),)),
            Row(f"{fleet.FOLLOWER}, beyond 2 KB: CPU", "ms"),
        ),
        fleet.follower,
    ),
    Axis(
        "fleet-read",
        (
            Row(f"{fleetload.AT_ONCE}: last", "s", (at_most(0.5),)),
            Row(f"{fleetload.AT_ONCE}: CPU of Redis, each", "ms"),
            Row(f"{fleetload.AT_ONCE}: CPU of a member", "ms"),
        ),
        fleetload.read,
    ),
    Axis(
        "fleet-load",
        (
            Row(f"Redis, {fleetload.LABEL}, idle: CPU", "%", (at_most(2),)),
            Row(f"Redis, {FLEET_CHANGES}: CPU", "%", (at_most(25),)),
            Row(f"Redis, {FLEET_CHANGES}: published", "/s", (Goal(95, least=True),)),
        ),
        fleetload.load,
    ),
)
MANY = environments.MANY
ENVIRONMENTS = Axis(
    "environments",
    (
        Row(f"{MANY}: exec → all served", "s", (at_most(1, PEER),)),
        Row(f"{MANY}: exec → all served, CPU", "cpu-s"),
        Row(f"{MANY}: memory", "MB", (at_most(0.5, PEER),)),
        Row(f"{MANY}: peak memory", "MB"),
        Row(f"{MANY}: idle CPU", "ms/min", (at_most(1, PEER),)),
    ),
    environments.many,
)
ENVIRONMENT_ADDED = Axis(
    "environment-added",
    (
        Row(f"one more than {MANY}: sent → served", "ms", (at_most(1, PEER),)),
        Row(f"one more than {MANY}: worst poll of another meanwhile", "ms", (at_most(10),)),
    ),
    environments.added,
)
ENVIRONMENT_POLLS = Axis(
    "environment-polls",
    (
        Row(f"poll among {MANY}, in polls of one alone", "×", (Goal(0.95, least=True),)),
        Row(f"poll among {MANY}", "req/cpu-s"),
    ),
    environments.beside,
)
DELTAS = (
    Axis(
        "fdv2-reconnect",
        (
            Row(f"{deltas.BACK}: last client, in full transfers", "×", (at_most(0.15),)),
            Row(f"{deltas.BACK}: CPU, in full transfers", "×", (at_most(0.15),)),
            Row(f"{deltas.BACK}: bytes, in full transfers", "×", (at_most(0.01),)),
            Row(f"{deltas.BACK}: last client", "s"),
            Row(f"{deltas.BACK}: CPU", "cpu-s"),
            Row(f"{deltas.BACK}: bytes", "MB"),
        ),
        deltas.reconnect,
    ),
    Axis(
        "fdv2-polls",
        (
            Row(f"{deltas.POLLED}, up to date, in 304s", "×", (Goal(0.9, least=True),)),
            Row(
                f"{deltas.POLLED}, one change behind, in polls of 2 KB",
                "×",
                (Goal(0.7, least=True),),
            ),
            Row(
                f"{deltas.POLLED}, without basis, in polls of {deltas.LATEST}",
                "×",
                (Goal(0.95, least=True),),
            ),
            Row(
                f"{deltas.POLLED}, without basis, not compressed, in polls of {deltas.LATEST}", "×"
            ),
            Row(f"{deltas.POLLED}, up to date", "req/cpu-s"),
            Row(f"{deltas.POLLED}, one change behind", "req/cpu-s"),
            Row(f"{deltas.POLLED}, without basis", "req/cpu-s"),
        ),
        deltas.polls,
    ),
    Axis(
        "fdv2-fan-out",
        (
            Row(f"{deltas.FAN_OUT}: last client, in those of FDv1", "×", (at_most(1.1),)),
            Row(f"{deltas.FAN_OUT}: CPU, in those of FDv1", "×", (at_most(1.1),)),
            Row(f"{deltas.FAN_OUT}: last client", "ms"),
            Row("idle stream of FDv2", "KB", (at_most(2),)),
        ),
        deltas.fan_out,
    ),
    Axis(
        "fdv2-restart",
        (
            *(
                Row(f"{deltas.RESTART}: {what}, in those of {other}", "×", goals)
                for other in ("FDv2 without basis", "FDv1")
                for what, goals in (
                    ("bytes from upstream", (at_most(0.05),)),
                    ("exec → current", ()),
                    ("CPU", ()),
                )
            ),
            Row(f"{deltas.RESTART}: bytes from upstream", "KB"),
            Row(f"{deltas.RESTART}: exec → current", "ms"),
            Row(f"{deltas.RESTART}: CPU", "cpu-ms"),
        ),
        deltas.restarts,
    ),
    Axis(
        "fdv2-journal",
        (
            Row(f"{deltas.JOURNAL}: memory", "MB", (at_most(3),)),
            Row(f"{deltas.JOURNAL}: cost of a patch, in those without", "×", (at_most(1.2),)),
            Row(f"{deltas.JOURNAL}: cost of a patch", "µs"),
        ),
        deltas.journal,
    ),
)
