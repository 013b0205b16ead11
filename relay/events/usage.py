"""What the relay tells LaunchDarkly of its own use (events 5.7): connections are billed by it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping

import orjson

from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.metrics import MetricValue
from relay.telemetry.traffic import RequestMetrics, Series, label_value

INTERVAL = 60.0
"""Seconds between two reports of an environment that has something to report."""

SCHEMA = 4

_POLLS = frozenset({"/sdk/flags", "/sdk/flags/{key}", "/sdk/segments/{key}", "/sdk/latest-all"})

Client = tuple[str, str]
"""User agent and platform."""


class UsageReporter:
    """Reports streams and polls of each environment.

    Args:
        environments: their names.
        traffic: what both doors have counted.
        accept: takes a report for delivery.
        interval: seconds between two reports.
    """

    def __init__(
        self,
        environments: Iterable[str],
        traffic: RequestMetrics,
        accept: Callable[[EventPayload], Awaitable[object]],
        interval: float = INTERVAL,
    ) -> None:
        self._environments = tuple(environments)
        self._traffic = traffic
        self._accept = accept
        self._interval = interval
        self._relay_id = str(uuid.uuid4())
        self._polls: Mapping[str, Counter[Client]] = {}
        """What the last report knew."""

    async def run(self) -> None:
        """Report until cancelled."""
        begun = time.monotonic()
        while True:
            await asyncio.sleep(self._interval)
            ended = time.monotonic()
            posts = self.posts(time.time(), ended - begun)
            begun = ended
            for post in posts:
                await self._accept(post)

    def posts(self, now: float, lasted: float) -> list[EventPayload]:
        """Return what is to be reported, and begin a new period.

        Args:
            now: Unix seconds.
            lasted: seconds of the period that ends, whatever was done to the clock meanwhile.
        """
        polls = _by_environment(self._traffic.requests, _POLLS)
        open_now = _by_environment(self._traffic.streams)
        opened = _by_environment(self._traffic.new_streams)
        period = {"startDate": round((now - lasted) * 1000), "endDate": round(now * 1000)}
        posts = []
        for name in self._environments:
            new_polls = polls.get(name, Counter()) - self._polls.get(name, Counter())
            lists = {
                "connections": _listed("current", open_now.get(name, Counter())),
                "newConnections": _listed("count", opened.get(name, Counter())),
                "pollingCounts": _listed("count", new_polls),
            }
            said = {member: clients for member, clients in lists.items() if clients}
            if said:
                event = {"kind": "relayMetrics", "relayId": self._relay_id, **period, **said}
                lane = Partition(name, EventsEndpoint.BULK, SCHEMA)
                posts.append(EventPayload(lane, str(uuid.uuid4()), orjson.dumps([event]), now))
        self._polls = polls
        return posts


def _by_environment(
    counts: Mapping[Series, MetricValue], routes: frozenset[str] | None = None
) -> dict[str, Counter[Client]]:
    sums: dict[str, Counter[Client]] = {}
    for series, count in counts.items():
        if routes is None or series.route in routes:
            clients = sums.setdefault(series.environment, Counter())
            clients[label_value(series.user_agent), series.platform] += count.value
    return sums


def _listed(what: str, clients: Counter[Client]) -> list[dict[str, object]]:
    return [
        {"userAgent": agent, "platformCategory": platform, what: number}
        for (agent, platform), number in clients.items()
        if number > 0
    ]
