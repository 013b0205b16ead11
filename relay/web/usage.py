"""What the relay tells LaunchDarkly of its own use (events 5.7): connections are billed by it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping

import orjson

from relay.model.count import Count
from relay.model.event import Endpoint, Lane, Post
from relay.web.traffic import Series, Traffic, tag

INTERVAL = 60.0
"""Seconds between two reports of an environment that has something to report."""

SCHEMA = 4

_POLLS = frozenset({"/sdk/flags", "/sdk/flags/{key}", "/sdk/segments/{key}", "/sdk/latest-all"})

Client = tuple[str, str]
"""User agent and platform."""


class Usage:
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
        traffic: Traffic,
        accept: Callable[[Post], Awaitable[object]],
        interval: float = INTERVAL,
    ) -> None:
        self._environments = tuple(environments)
        self._traffic = traffic
        self._accept = accept
        self._interval = interval
        self._relay_id = str(uuid.uuid4())
        self._since = time.time()
        self._polls: Mapping[str, Counter[Client]] = {}
        """What the last report knew."""

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            for post in self.posts(time.time()):
                await self._accept(post)

    def posts(self, now: float) -> list[Post]:
        """Return what is to be reported, and begin a new period.

        Args:
            now: Unix seconds.
        """
        polls = _by_environment(self._traffic.requests, _POLLS)
        open_now = _by_environment(self._traffic.streams)
        opened = _by_environment(self._traffic.new_streams)
        # The clock may have been set back meanwhile.
        since = min(self._since, now)
        period = {"startDate": round(since * 1000), "endDate": round(now * 1000)}
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
                lane = Lane(name, Endpoint.BULK, SCHEMA)
                posts.append(Post(lane, str(uuid.uuid4()), orjson.dumps([event]), now))
        self._polls, self._since = polls, now
        return posts


def _by_environment(
    counts: Mapping[Series, Count], routes: frozenset[str] | None = None
) -> dict[str, Counter[Client]]:
    sums: dict[str, Counter[Client]] = {}
    for series, count in counts.items():
        if routes is None or series.route in routes:
            clients = sums.setdefault(series.environment, Counter())
            clients[tag(series.user_agent), series.platform] += count.value
    return sums


def _listed(what: str, clients: Counter[Client]) -> list[dict[str, object]]:
    return [
        {"userAgent": agent, "platformCategory": platform, what: number}
        for (agent, platform), number in clients.items()
        if number > 0
    ]
