"""Reports of the relay's own use to LaunchDarkly, which bills connections by them (events 5.7)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

import orjson

from relay import clock, randomness
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.metrics import MetricValue
from relay.registry import Registry
from relay.telemetry.traffic import RequestLabels, RequestMetrics, label_value

INTERVAL = 60.0
"""Seconds between two reports of an environment; one without traffic is not reported."""

SCHEMA = 4

Client = tuple[str, str]
"""User agent and platform of a client."""


class UsageReporter:
    """Reports the streams and polls of each environment.

    Args:
        names: returns the names of the environments, and of those that are gone but not forgotten.
        traffic: request counts of the fast path and the application.
        accept: accepts a report for delivery, as `Forwarder.accept`.
        polls: routes of polls, by their templates.
        interval: seconds between two reports.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        traffic: RequestMetrics,
        accept: Callable[[EventPayload], Awaitable[object]],
        polls: Collection[str],
        interval: float = INTERVAL,
    ) -> None:
        self._names = names
        self._traffic = traffic
        self._accept = accept
        self._poll_routes = polls
        self._interval = interval
        self._relay_id = randomness.new_id()
        self._polls: Mapping[str, Counter[Client]] = {}
        """Poll counts at the last report."""

    async def run(self) -> None:
        """Report until cancelled."""
        begun = clock.monotonic()
        while True:
            await asyncio.sleep(self._interval)
            ended = clock.monotonic()
            payloads = self.collect(clock.unix(), ended - begun)
            begun = ended
            for payload in payloads:
                await self._accept(payload)

    def collect(self, now: float, lasted: float) -> list[EventPayload]:
        """Return the reports of the period that ends, and begin a new one.

        Args:
            now: the system's time in Unix seconds.
            lasted: length of the period in seconds, by a clock that is never corrected.
        """
        polls = _by_environment(self._traffic.requests, self._poll_routes)
        open_now = _by_environment(self._traffic.streams)
        opened = _by_environment(self._traffic.new_streams)
        period = {"startDate": round((now - lasted) * 1000), "endDate": round(now * 1000)}
        payloads = []
        for name in self._names():
            new_polls = polls.get(name, Counter()) - self._polls.get(name, Counter())
            lists = {
                "connections": _list_clients("current", open_now.get(name, Counter())),
                "newConnections": _list_clients("count", opened.get(name, Counter())),
                "pollingCounts": _list_clients("count", new_polls),
            }
            members = {member: clients for member, clients in lists.items() if clients}
            if members:
                event = {"kind": "relayMetrics", "relayId": self._relay_id, **period, **members}
                partition = Partition(name, EventsEndpoint.BULK, SCHEMA)
                body = orjson.dumps([event])
                payloads.append(EventPayload(partition, randomness.new_id(), body, clock.now()))
        self._polls = polls
        return payloads


def reported_names(registry: Registry[Any]) -> list[str]:
    """Return the environments whose use is reported: not the filtered ones, as by ld-relay."""
    specs = {name: registry.spec_of(name) for name in registry.names()}
    return [name for name, spec in specs.items() if spec and not spec.payload_filter]


def _by_environment(
    counts: Mapping[RequestLabels, MetricValue], routes: Collection[str] | None = None
) -> dict[str, Counter[Client]]:
    sums: dict[str, Counter[Client]] = {}
    for labels, count in counts.items():
        if routes is None or labels.route in routes:
            clients = sums.setdefault(labels.environment, Counter())
            clients[label_value(labels.user_agent), labels.platform] += count.value
    return sums


def _list_clients(member: str, clients: Counter[Client]) -> list[dict[str, object]]:
    return [
        {"userAgent": agent, "platformCategory": platform, member: number}
        for (agent, platform), number in clients.items()
        if number > 0
    ]
