"""Reports: what is counted, and which lines the log gets."""

from __future__ import annotations

import logging

import pytest

from relay.events.reports import EventReports
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventsEndpoint, Partition
from tests.support.clocks import SystemClock

SPEC = EnvironmentSpec("prod", SDKKey("sdk-prod"))
PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
MOBILE = Partition("prod", EventsEndpoint.MOBILE, 4)


@pytest.fixture
def reports(caplog):
    caplog.set_level(logging.INFO)
    return EventReports(lambda _: SPEC)


def said(caplog):
    return [record.getMessage() for record in caplog.records]


def test_an_outage_is_logged_at_its_beginning_and_end(reports, caplog):
    """Once each, for each environment and endpoint; another partition of both is the same."""
    tagged = PARTITION._replace(tags="a/b")
    assert reports.begin_outage(PARTITION, "HTTP error 503")
    assert not reports.begin_outage(tagged, "HTTP error 500")
    assert reports.is_failing(tagged)
    assert not reports.is_failing(MOBILE)
    assert reports.failing_environments == {"prod"}
    reports.end_outage(MOBILE)
    reports.end_outage(tagged)
    reports.end_outage(PARTITION)
    assert not reports.failing_environments
    assert said(caplog) == [
        "Events for /bulk cannot be delivered: HTTP error 503; they are kept and tried again",
        "Events for /bulk are delivered again",
    ]


def test_losses_are_logged_at_once_and_then_once_a_minute(reports, caplog):
    """Their sums, by fate; the rest at the end."""
    with SystemClock() as system:
        reports.count_evicted("prod", 1)
        reports.count_evicted("prod", 2)
        reports.count_quarantined("prod", 3, 3, "upstream rejects them")
        system.skip(61)
        reports.count_evicted("prod", 4)
        reports.count_evicted("prod", 5)
    reports.log_losses()
    reports.log_losses()
    given_up = "%d posts of events were given up, as there is no room or they are too old"
    aside = "3 posts of events were set aside, as upstream rejects them"
    assert said(caplog) == [given_up % 1, aside, given_up % 6, given_up % 5]


def test_a_payload_that_was_evicted_and_has_arrived_is_no_loss(reports, caplog):
    """It is taken back, and not logged with the next ones."""
    reports.count_evicted("prod", 1)
    reports.count_evicted("prod", 2)
    reports.count_evicted("prod", -2)
    reports.count_delivered("prod", 2)
    reports.log_losses()
    counts = reports.counts["prod"]
    assert (counts.evicted, counts.forwarded, counts.waiting) == (1, 2, -3)
    assert [text.partition(" ")[0] for text in said(caplog)] == ["1"]


def test_parts_of_a_payload_wait_until_it_is_complete(reports):
    """Each part in the quarantine counts."""
    reports.counts["prod"].waiting = 1
    for complete in (0, 1):
        reports.count_quarantined("prod", 1, complete, "upstream rejects them")
    assert (reports.counts["prod"].quarantined, reports.counts["prod"].waiting) == (2, 0)


def test_an_environment_that_is_gone_is_forgotten(reports, caplog):
    """Its counts and its outages, not without its last losses in the log."""
    reports.counts["prod"].received = 5
    reports.begin_outage(PARTITION, "HTTP error 503")
    reports.begin_outage(PARTITION._replace(environment="test"), "HTTP error 503")
    reports.count_evicted("prod", 1)
    reports.count_evicted("prod", 2)
    reports.forget("prod")
    assert said(caplog)[-1].startswith("2 posts of events were given up")
    assert reports.failing_environments == {"test"}
    assert reports.counts["prod"].received == 0
    assert repr(reports) == "<EventReports: 1 environments, 1 failing>"
