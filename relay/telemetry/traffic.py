"""Counts of requests and streams, and the access log at level debug (status 8.2, 8.3).

Fed by the fast path and the application. Counting costs one addition; requests are logged only if
the level was debug at the start of the process. Unlike ld-relay's, the lines have neither keys nor
contexts nor queries.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from relay.model.metrics import MetricValue
from relay.telemetry.redaction import CREDENTIAL, mask_credential

MAX_USER_AGENTS = 64
"""Maximum number of user agents with counts of their own: far more than a site has SDKs and their
versions. Further ones, such as made-up names, share the label `OTHER`."""

MAX_USER_AGENT = 80
"""Length in characters to which user agents are truncated."""

OTHER = "other"
"""Label of the user agents beyond `MAX_USER_AGENTS`."""


_log = logging.getLogger("relay.traffic")


class RequestLabels(NamedTuple):
    """Labels of a count; each has a bounded number of values."""

    environment: str
    """Display name of the environment."""
    route: str
    """Template of the path, such as `/sdk/flags/{key}`."""
    method: str
    platform: str
    """`server`, `mobile` or `browser`, by the kind of the route's credential."""
    user_agent: str = ""
    """As returned by `RequestMetrics.user_agent`; empty if the client has no name."""


Counts = defaultdict[RequestLabels, MetricValue]


class StreamCounts(NamedTuple):
    """Counts that a new stream adds to."""

    requests: MetricValue
    opened: MetricValue
    open: MetricValue
    """Its user adds the stream, and subtracts it at its end."""


class RequestMetrics:
    """Counts of requests and streams since the start, and of open streams."""

    def __init__(self) -> None:
        self.requests: Counts = defaultdict(MetricValue)
        """Requests whose credential was accepted, streams included."""
        self.new_streams: Counts = defaultdict(MetricValue)
        """Streams opened since the start."""
        self.streams: Counts = defaultdict(MetricValue)
        """Open streams."""
        self.unusable: Counter[str] = Counter()
        """Unusable event payloads, and malformed events of old schemas, by environment."""
        self.discarded: Counter[str] = Counter()
        """Event payloads dropped for want of an upstream to deliver them to, by environment."""
        self._user_agents: set[str] = set()
        self.logs = _log.isEnabledFor(logging.DEBUG)
        """True if each request is logged."""

    def follow_level(self) -> bool:
        """Log each request from now on, or no longer, as the log's level says; return if new."""
        before, self.logs = self.logs, _log.isEnabledFor(logging.DEBUG)
        return self.logs is not before

    def stream_counts(self, labels: RequestLabels) -> StreamCounts:
        """Return the counts of streams with these labels, to be kept by whoever opens many."""
        return StreamCounts(self.requests[labels], self.new_streams[labels], self.streams[labels])

    def user_agent(self, own: bytes, general: bytes) -> str:
        """Return the label of a client's user agent.

        Args:
            own: the header `X-LaunchDarkly-User-Agent`, empty if there is none; takes precedence.
            general: the header `User-Agent`, empty if there is none.
        """
        name = _printable((own or general)[:MAX_USER_AGENT])
        if name not in self._user_agents:
            if len(self._user_agents) >= MAX_USER_AGENTS:
                return OTHER
            self._user_agents.add(name)
        return name

    def forget(self, environment: str) -> None:
        """Drop the counts of an environment that is gone."""
        for counts in (self.requests, self.new_streams, self.streams):
            for labels in [labels for labels in counts if labels.environment == environment]:
                del counts[labels]
        for by_name in (self.unusable, self.discarded):
            by_name.pop(environment, None)


def client_label(traffic: RequestMetrics, headers: Mapping[bytes, bytes]) -> str:
    """Return the label of the user agent of a request on the fast path."""
    own, general = headers.get(b"x-launchdarkly-user-agent", b""), headers.get(b"user-agent", b"")
    return traffic.user_agent(own, general)


def label_value(value: str) -> str:
    """Return a label value with ld-relay's replacements (status 8.2)."""
    return value.replace("/", "_") or "_"


def totals(counts: Mapping[RequestLabels, MetricValue]) -> Mapping[str, int]:
    """Return the sums of counts by environment."""
    sums: defaultdict[str, int] = defaultdict(int)
    for labels, count in counts.items():
        sums[labels.environment] += count.value
    return sums


@lru_cache(maxsize=2 * MAX_USER_AGENTS)
def _printable(user_agent: bytes) -> str:
    """Return a user agent as printable text with masked credentials."""
    text = "".join(c if c.isprintable() else "?" for c in user_agent.decode("latin-1").strip())
    return CREDENTIAL.sub(lambda match: mask_credential(match[0]), text)
