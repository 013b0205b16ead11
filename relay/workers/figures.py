"""Reports of a worker's figures to the feeder."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

from relay.model.metrics import MetricValue
from relay.protocol.workers import Figures, Series
from relay.relay import Relay
from relay.telemetry import process
from relay.telemetry.traffic import RequestLabels, RequestMetrics

INTERVAL = 1.0
"""Seconds between two reports; so much may be lost if a worker is killed."""


class FiguresReporter:
    """Sends what has been counted since the last report.

    Args:
        relay: of the worker.
        traffic: counts requests.
        report: sends a report; returns False if nobody could take it.
    """

    def __init__(
        self, relay: Relay, traffic: RequestMetrics, report: Callable[[Figures], bool]
    ) -> None:
        self._relay = relay
        self._traffic = traffic
        self._report = report
        self._requests: Counter[RequestLabels] = Counter()
        self._new_streams: Counter[RequestLabels] = Counter()
        self._unusable: Counter[str] = Counter()
        self._discarded: Counter[str] = Counter()
        self._delays: dict[str, tuple[float, tuple[int, ...]]] = {}
        self._answers: Counter[tuple[str, str, str, str]] = Counter()
        self._saved: Counter[tuple[str, str]] = Counter()
        self._reads: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<FiguresReporter of {self._relay}>"

    async def run(self) -> None:
        """Report at intervals, until cancelled; then what is left."""
        try:
            while True:
                self.report()
                await asyncio.sleep(INTERVAL)
        finally:
            self.report()

    def report(self) -> None:
        """Report now."""
        traffic = self._traffic
        requests, new_streams = _values(traffic.requests), _values(traffic.new_streams)
        unusable, discarded = Counter(traffic.unusable), Counter(traffic.discarded)
        answers, saved = self._count_answers()
        delays = {
            name: (each.hub.delays.total, each.hub.delays.counts)
            for name, each in self._relay.environments.items()
        }
        reads, failed = Counter[str](), Counter[str]()
        for name, each in self._relay.environments.items():
            if each.big_segments is not None:
                reads[name], failed[name] = each.big_segments.reads, each.big_segments.failed_reads
        figures = Figures(
            requests=_increments(requests, self._requests),
            new_streams=_increments(new_streams, self._new_streams),
            unusable=tuple((unusable - self._unusable).items()),
            discarded=tuple((discarded - self._discarded).items()),
            delays=tuple(self._new_delays(delays)),
            clients=tuple((labels, n) for labels, n in _values(traffic.streams).items() if n),
            streams=tuple(
                (name, stream, number)
                for name, each in self._relay.environments.items()
                for stream, number in each.hub.streams.items()
                if number
            ),
            resident=process.resident_bytes(),
            cpu=process.cpu_seconds(),
            files=process.open_files(),
            answers=tuple((*of, number) for of, number in (answers - self._answers).items()),
            saved=tuple((*of, number) for of, number in (saved - self._saved).items()),
            delayed=self._relay.admission.waiting,
            unread=self._relay.admission.unread,
            cut=self._relay.admission.cut,
            reads=tuple(
                (name, reads[name] - self._reads[name], failed[name] - self._failed[name])
                for name in reads
                if reads[name] != self._reads[name]
            ),
        )
        if self._report(figures):
            self._requests, self._new_streams = requests, new_streams
            self._unusable, self._discarded, self._delays = unusable, discarded, delays
            self._answers, self._saved = answers, saved
            self._reads, self._failed = reads, failed

    def _count_answers(self) -> tuple[Counter[tuple[str, str, str, str]], Counter[tuple[str, str]]]:
        answers: Counter[tuple[str, str, str, str]] = Counter()
        saved: Counter[tuple[str, str]] = Counter()
        for name, environment in self._relay.environments.items():
            for side, counts in environment.answers.items():
                for (kind, reason), number in counts.numbers.items():
                    answers[name, side, kind, reason] = number.value
                saved[name, side] = counts.saved.value
        return answers, saved

    def _new_delays(
        self, delays: Mapping[str, tuple[float, tuple[int, ...]]]
    ) -> list[tuple[str, float, tuple[int, ...]]]:
        result = []
        for name, (total, counts) in delays.items():
            before_total, before = self._delays.get(name, (0.0, (0,) * len(counts)))
            if counts != before:
                increments = tuple(now - then for now, then in zip(counts, before, strict=True))
                result.append((name, total - before_total, increments))
        return result


def _values(counts: Mapping[RequestLabels, MetricValue]) -> Counter[RequestLabels]:
    return Counter({labels: count.value for labels, count in counts.items()})


def _increments(
    now: Counter[RequestLabels], before: Counter[RequestLabels]
) -> tuple[tuple[Series, int], ...]:
    return tuple((labels, n - before[labels]) for labels, n in now.items() if n != before[labels])
