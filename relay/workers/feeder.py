"""The feeder: owns what a relay has once, and feeds the workers."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial

from relay import clock
from relay.environment import Environment
from relay.errors import StoreUnavailable, UpstreamUnavailable
from relay.events.intake import EventAcceptor
from relay.model.environment import EnvironmentSpec
from relay.protocol.workers import (
    FROM_WORKER,
    Answer,
    Applied,
    Check,
    EnvironmentGone,
    EnvironmentPut,
    Fed,
    FetchRequest,
    Figures,
    FiguresRequest,
    FromFeeder,
    FromWorker,
    Hello,
    Listed,
    NotStored,
    PageRequest,
    Post,
    Stored,
    WebhookRequest,
    frame,
)
from relay.relay import Relay
from relay.telemetry.traffic import RequestLabels, RequestMetrics
from relay.telemetry.workers import WorkerStatus
from relay.workers.connection import Connection
from relay.workers.hub import Worker, WorkersHub

Respond = Callable[[PageRequest | WebhookRequest], Answer]
"""Return the answer to a request; its number is 0."""


REPORTED_WITHIN = 0.1
"""Seconds that a page waits for the figures of all workers; then it shows those of before."""


class _WorkerState:
    """A connected worker.

    Args:
        status: shown in `/status`.
        holds: names of the environments of which it had data when it connected.
    """

    def __init__(self, status: WorkerStatus, holds: frozenset[str]) -> None:
        self.status = status
        self.holds = holds
        self.clients: dict[RequestLabels, int] = {}
        """Open streams, as last reported."""
        self.reported = asyncio.Event()
        """Set when the worker has reported its figures."""


class Feeder:
    """Lets workers serve the environments of a relay.

    Args:
        relay: owns the environments; their hubs are `WorkersHub`s.
        traffic: takes the counts of all workers.
        acceptor: accepts events; None if they are disabled.
        respond: answers requests.
    """

    def __init__(
        self,
        relay: Relay,
        traffic: RequestMetrics,
        acceptor: EventAcceptor | None,
        respond: Respond,
    ) -> None:
        self._relay = relay
        self._traffic = traffic
        self._acceptor = acceptor
        self._respond = respond
        self._workers: dict[Worker, _WorkerState] = {}
        self._listed: dict[Environment, EnvironmentSpec] = {}
        """Environments that the workers know."""
        self._by_number: dict[int, Environment] = {}
        self._changed = asyncio.Event()
        """Set when the registry has changed."""
        self._requests: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Feeder of {len(self._workers)} workers, {len(self._listed)} environments>"

    async def run(self, listener: socket.socket) -> None:
        """Feed the workers that connect to a socket, until cancelled."""
        self._relay.registry.on_change = self._changed.set
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._connection, sock=listener.dup())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._report_known())
                while True:
                    self._list()
                    await self._changed.wait()
                    self._changed.clear()
        finally:
            server.close()
            for worker in list(self._workers):
                worker.close()

    def _connection(self) -> Worker:
        return Connection(FROM_WORKER, self._receive, self._lost)

    async def _report_known(self) -> None:
        """Let workers refuse unknown credentials once all are known."""
        if self._relay.directory is not None:
            await self._relay.directory.known.wait()
            self._changed.set()

    # Environments

    def _list(self) -> None:
        """Let all workers know which environments there are now."""
        environments = self._relay.environments.values()
        new: list[Environment] = []
        for environment in self._listed.keys() - set(environments):
            hub = _hub(environment)
            del self._listed[environment], self._by_number[hub.number]
            self._broadcast(EnvironmentGone(hub.number))
            for worker in self._workers:
                hub.discard(worker)
        for environment in environments:
            spec, number = environment.spec, _hub(environment).number
            if self._listed.get(environment) != spec:
                new += [] if environment in self._listed else [environment]
                self._listed[environment] = spec
                self._by_number[number] = environment
                self._broadcast(EnvironmentPut.of(number, spec))
        self._broadcast(self._listing())
        for environment in new:
            for worker in self._workers:
                self._feed(worker, environment)

    def _listing(self) -> Listed:
        """Return the end of a list of environments."""
        find = self._relay.registry.find
        numbers = Counter(
            (each, spec.payload_filter)
            for spec in self._listed.values()
            for each in spec.credentials
        )
        shared = {key for key, number in numbers.items() if number > 1}
        owned: Counter[int] = Counter()
        for environment, spec in self._listed.items() if shared else ():
            number = _hub(environment).number
            for each in spec.credentials:
                if (each, spec.payload_filter) in shared:
                    owner = find(each.kind, each.value, spec.payload_filter)
                    owned[number] += owner is environment
        owners = tuple(sorted(owned, key=owned.__getitem__))
        return Listed(self._relay.knows_environments, owners)

    def _feed(self, worker: Worker, environment: Environment) -> None:
        has_data = environment.spec.name in self._workers[worker].holds
        _hub(environment).add(worker, environment.payload, has_data=has_data)

    def _broadcast(self, message: FromFeeder) -> None:
        data = frame(message)
        for worker in self._workers:
            worker.write(data)

    # Workers

    def _receive(self, worker: Worker, message: FromWorker) -> None:
        match message:
            case Post():
                self._accept(worker, message)
            case Figures():
                self._count(self._workers[worker], worker, message)
            case Hello():
                self._welcome(worker, message)
            case Applied() | Check():
                environment = self._by_number.get(message.number)
                if environment is not None:
                    self._pass_on(worker, environment, message)
            case WebhookRequest():
                self._answer(worker, message)
            case PageRequest():
                self._begin(self._show(worker, message))
            case FetchRequest():
                self._begin(self._fetch(worker, message))

    @staticmethod
    def _pass_on(worker: Worker, environment: Environment, message: Applied | Check) -> None:
        if isinstance(message, Applied):
            _hub(environment).note_applied(worker, message.change)
        else:
            environment.check(reconnect=message.reconnect)

    def _welcome(self, worker: Worker, hello: Hello) -> None:
        status = _succeed(self._relay.workers.get(hello.worker), hello)
        self._relay.workers[hello.worker] = status
        self._workers[worker] = _WorkerState(status, hello.holds)
        for environment, spec in self._listed.items():
            worker.send(EnvironmentPut.of(_hub(environment).number, spec))
        worker.send(self._listing())
        for environment in self._listed:
            self._feed(worker, environment)
        worker.send(Fed())

    def _lost(self, worker: Worker) -> None:
        state = self._workers.pop(worker, None)
        if state is None:
            return
        state.status.connected = False
        state.status.streams = state.status.delayed = state.status.unread = 0
        self._count_clients(state, {})
        for environment in self._listed:
            _hub(environment).discard(worker)

    def _count(self, state: _WorkerState, worker: Worker, figures: Figures) -> None:
        traffic = self._traffic
        for counts, increments in (
            (traffic.requests, figures.requests),
            (traffic.new_streams, figures.new_streams),
        ):
            for series, increment in increments:
                counts[RequestLabels(*series)].value += increment
        traffic.unusable.update(dict(figures.unusable))
        traffic.discarded.update(dict(figures.discarded))
        environments = self._relay.environments
        for name, total, buckets in figures.delays:
            if name in environments:
                environments[name].hub.delays.merge(total, buckets)
        self._count_answers(figures)
        self._count_clients(state, {RequestLabels(*s): number for s, number in figures.clients})
        by_environment: dict[str, dict[str, int]] = {name: {} for name in environments}
        for name, stream, number in figures.streams:
            by_environment.setdefault(name, {})[stream] = number
        for name, environment in environments.items():
            _hub(environment).report(worker, by_environment[name])
        status = state.status
        status.streams = sum(number for _, _, number in figures.streams)
        status.resident, status.files = figures.resident, figures.files
        status.cpu = status.former_cpu + figures.cpu
        status.delayed, status.unread = figures.delayed, figures.unread
        status.cut = status.former_cut + figures.cut
        state.reported.set()

    def _count_answers(self, figures: Figures) -> None:
        environments = self._relay.environments
        for name, side, kind, reason, number in figures.answers:
            if name in environments:
                environments[name].answers[side].numbers[kind, reason].value += number
        for name, side, saved in figures.saved:
            if name in environments:
                environments[name].answers[side].saved.value += saved
        for name, reads, failed in figures.reads:
            big_segments = environments[name].big_segments if name in environments else None
            if big_segments is not None:
                big_segments.reads += reads
                big_segments.failed_reads += failed

    def _count_clients(self, state: _WorkerState, clients: dict[RequestLabels, int]) -> None:
        for labels in state.clients.keys() | clients.keys():
            difference = clients.get(labels, 0) - state.clients.get(labels, 0)
            self._traffic.streams[labels].value += difference
        state.clients = clients

    # Requests

    def _accept(self, worker: Worker, post: Post) -> None:
        if self._acceptor is None:
            worker.send(NotStored(post.number))
            return
        try:
            stored = self._acceptor.accept(post.payload)
        except StoreUnavailable:
            worker.send(NotStored(post.number))
            return
        if stored.done():
            self._acknowledge(worker, post, stored)
        else:
            stored.add_done_callback(partial(self._acknowledge, worker, post))

    def _acknowledge(self, worker: Worker, post: Post, stored: asyncio.Future[bool]) -> None:
        if self._acceptor is None or stored.cancelled() or stored.exception() is not None:
            worker.send(NotStored(post.number))
            return
        time = self._acceptor.server_time(post.payload.partition.environment)
        worker.send(Stored(post.number, stored.result(), time))

    def _begin(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    def _answer(self, worker: Worker, request: PageRequest | WebhookRequest) -> None:
        answer = self._respond(request)
        worker.send(Answer(request.number, answer.status, answer.headers, answer.body))

    async def _show(self, worker: Worker, request: PageRequest) -> None:
        """Answer for a page, with the figures that all workers have now."""
        if worker not in self._workers:
            return  # it has gone, and perhaps all others
        reports = [asyncio.create_task(each.reported.wait()) for each in self._workers.values()]
        for each in self._workers.values():
            each.reported.clear()
        self._broadcast(FiguresRequest())
        await asyncio.wait(reports, timeout=REPORTED_WITHIN)
        for report in reports:
            report.cancel()
        self._answer(worker, request)

    async def _fetch(self, worker: Worker, request: FetchRequest) -> None:
        if self._relay.fetch is None:
            worker.send(Answer(request.number, 0, (), b"there is no network"))
            return
        try:
            reply = await self._relay.fetch(
                request.url,
                headers=request.headers,
                within=request.within,
                max_body=request.max_body,
            )
        except UpstreamUnavailable as e:
            worker.send(Answer(request.number, 0, (), str(e).encode()))
            return
        headers = tuple(
            (name.encode("latin-1"), value.encode("latin-1", "replace"))
            for name, value in reply.headers.items()
        )
        worker.send(Answer(request.number, reply.status, headers, reply.body))


def _succeed(known: WorkerStatus | None, hello: Hello) -> WorkerStatus:
    """Return the status of a worker that has connected.

    Args:
        known: that of its former connection, or process.
        hello: its first message.
    """
    status = WorkerStatus(hello.worker, hello.process, clock.unix())
    if known is not None:
        is_same = known.process == hello.process
        status.starts = known.starts + (not is_same)
        status.cpu = known.cpu
        status.former_cpu = known.former_cpu if is_same else known.cpu
        status.cut = known.cut
        status.former_cut = known.former_cut if is_same else known.cut
    return status


def _hub(environment: Environment) -> WorkersHub:
    if not isinstance(environment.hub, WorkersHub):
        raise TypeError(f"{environment} has streams of its own")
    return environment.hub
