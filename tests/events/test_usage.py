"""The relay reports its use to LaunchDarkly as ld-relay does."""

import json
from dataclasses import replace
from pathlib import Path

from relay.events.usage import SCHEMA, UsageReporter, reported_names
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventsEndpoint, Partition
from relay.registry import Registry
from relay.telemetry.traffic import RequestLabels, RequestMetrics
from relay.web.routes import POLLS

GOLDEN = Path(__file__).parent.parent / "golden" / "usage.json"
MASKED = {"relayId": "<uuid>", "startDate": "<ms>", "endDate": "<ms>"}


class Reports:
    """Request counts of a relay, and its reports of them."""

    def __init__(self) -> None:
        self.traffic = RequestMetrics()
        self.usage = UsageReporter(lambda: ["main", "quiet"], self.traffic, self._accept, POLLS)

    async def _accept(self, _payload) -> None:
        raise AssertionError

    def stream(self, agent: str, change: int, opened: int = 0) -> None:
        series = RequestLabels("main", "/all", "GET", "server", agent)
        self.traffic.streams[series].value += change
        self.traffic.new_streams[series].value += opened

    def poll(self, agent: str, number: int, route: str = "/sdk/flags") -> None:
        self.traffic.requests[RequestLabels("main", route, "GET", "server", agent)].value += number

    def collect(self, now: float, lasted: float = 60) -> list[dict]:
        return [
            event
            for payload in self.usage.collect(now, lasted)
            for event in json.loads(payload.body)
        ]


def test_a_report_is_the_recorded_one():
    """One stream and one poll: members, their order and names are ld-relay's."""
    reports = Reports()
    reports.stream("PyClient/9.0", 1, opened=1)
    reports.poll("PHPClient/6", 1)
    (payload,) = reports.usage.collect(1e10, 60)
    assert payload.partition == Partition("main", EventsEndpoint.BULK, SCHEMA)
    (event,) = json.loads(payload.body)
    recorded = json.loads(GOLDEN.read_text())
    assert json.dumps([{**event, **MASKED}]) == json.dumps(recorded)


def test_periods_follow_each_other_and_polls_are_counted_in_one():
    """New streams are counted since the start, polls since the last report."""
    reports = Reports()
    reports.stream("a", 2, opened=2)
    reports.poll("a", 5)
    (first,) = reports.collect(1e10)
    reports.stream("a", -1)
    reports.poll("a", 2, "/sdk/flags/{key}")
    reports.poll("a", 9, "/all")
    (second,) = reports.collect(1e10 + 60)
    assert first["endDate"] == second["startDate"]
    assert first["relayId"] == second["relayId"]
    assert second["connections"][0]["current"] == 1
    assert second["newConnections"][0]["count"] == 2
    assert second["pollingCounts"][0]["count"] == 2


def test_a_period_is_as_long_as_it_was_though_the_clock_is_corrected():
    """It ends by the present clock, and began as long before as time has passed."""
    reports = Reports()
    for now in (1e10, 1e10 + 8 * 86400, 1e10 - 8 * 86400):
        reports.poll("a", 1)
        (event,) = reports.collect(now, 60.5)
        assert (event["startDate"], event["endDate"]) == ((now - 60.5) * 1000, now * 1000)


def test_nothing_is_said_where_nothing_happens():
    """No streams, no polls: no report; and what is over is not reported for ever."""
    reports = Reports()
    assert reports.collect(1e10) == []
    reports.poll("", 1)
    (event,) = reports.collect(1e10 + 60)
    assert event["pollingCounts"] == [{"userAgent": "_", "platformCategory": "server", "count": 1}]
    assert reports.collect(1e10 + 120) == []


def test_no_period_ends_before_it_began():
    """The clock may be set back between two reports."""
    reports = Reports()
    for now in (1e10, 1e10 - 8 * 86400):
        reports.poll("a", 1)
        (event,) = reports.collect(now)
        assert event["startDate"] <= event["endDate"] == now * 1000


def test_filtered_environments_are_not_reported():
    """As by ld-relay: LaunchDarkly bills connections by the reports."""
    registry: Registry[str] = Registry()
    whole = EnvironmentSpec("main", SDKKey("sdk-1"))
    registry.put("1", whole)
    registry.put("2", replace(whole, name="main/north", payload_filter="north"))
    registry.remove("2")
    assert reported_names(registry) == ["main"]
