"""What is asked of the relay: counts, and at level debug a line for each request (status 8.2, 8.3).

Both doors feed it. Counting costs an addition; lines are made only if the level was debug when the
process started. They hold neither keys nor contexts nor queries, unlike the reference's.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from relay.model.metrics import MetricValue
from relay.telemetry.redaction import _CREDENTIAL, _masked

MAX_USER_AGENTS = 64
"""Kinds of clients that are counted apart, far more than a site has SDKs and versions of them. Of
all further ones, as when somebody makes names up, there is only one count."""

MAX_USER_AGENT = 80
"""Characters of a client's name that tell it apart."""

OTHER = "other"
"""The name of the clients beyond."""


_log = logging.getLogger("relay.traffic")


class Series(NamedTuple):
    """What is counted apart. There is a bound on the number of each of these."""

    environment: str
    """Its display name."""
    route: str
    """The template, such as `/sdk/flags/{key}`."""
    method: str
    platform: str
    """`server`, `mobile` or `browser`: whose credential opens the route."""
    user_agent: str = ""
    """As `RequestMetrics.user_agent` gives it; empty if the client has no name."""


Counts = defaultdict[Series, MetricValue]


class RequestMetrics:
    """Counts of requests and streams since the start, and of the streams that are open."""

    def __init__(self) -> None:
        self.requests: Counts = defaultdict(MetricValue)
        """Requests that passed the choice of the environment, streams included."""
        self.new_streams: Counts = defaultdict(MetricValue)
        """Streams that were opened."""
        self.streams: Counts = defaultdict(MetricValue)
        """Streams that are open."""
        self.unusable: Counter[str] = Counter()
        """Posts and events of SDKs that could not be used, by environment."""
        self.discarded: Counter[str] = Counter()
        """Posts of SDKs that were dropped, as nobody is there to deliver them to."""
        self._user_agents: set[str] = set()
        self.logs = _log.isEnabledFor(logging.DEBUG)
        """Whether each request is logged."""

    def user_agent(self, own: bytes, general: bytes) -> str:
        """Return the name under which a client is counted.

        Args:
            own: the header `X-LaunchDarkly-User-Agent`, empty if there is none; it comes first.
            general: the header `User-Agent`, empty if there is none.
        """
        name = _readable((own or general)[:MAX_USER_AGENT])
        if name not in self._user_agents:
            if len(self._user_agents) >= MAX_USER_AGENTS:
                return OTHER
            self._user_agents.add(name)
        return name


def client_label(traffic: RequestMetrics, headers: Mapping[bytes, bytes]) -> str:
    """Return the name under which the client of a request at the front door is counted."""
    own, general = headers.get(b"x-launchdarkly-user-agent", b""), headers.get(b"user-agent", b"")
    return traffic.user_agent(own, general)


def label_value(value: str) -> str:
    """Return a name as the reference writes it in figures (status 8.2)."""
    return value.replace("/", "_") or "_"


def totals(counts: Mapping[Series, MetricValue]) -> Mapping[str, int]:
    """Return the sum for each environment."""
    sums: defaultdict[str, int] = defaultdict(int)
    for series, count in counts.items():
        sums[series.environment] += count.value
    return sums


@lru_cache(maxsize=2 * MAX_USER_AGENTS)
def _readable(user_agent: bytes) -> str:
    """Return a client's name as one short line without credentials."""
    text = "".join(c if c.isprintable() else "?" for c in user_agent.decode("latin-1").strip())
    return _CREDENTIAL.sub(lambda match: _masked(match[0]), text)
