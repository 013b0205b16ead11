"""Lines about outages."""

from __future__ import annotations

import logging

import pytest

from relay.telemetry.outage import OutageLog

LOG = logging.getLogger("relay.outage")


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, "relay.outage")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(lines):
    """However many failures and successes there are; the next outage is logged again."""
    outage = OutageLog(LOG)
    for reason in ("first", "second"):
        assert outage.end("%s works", "it") is False
        assert outage.begin(reason, "%s fails: %s", "it", reason) is True
        assert outage.begin("other", "%s fails: %s", "it", "other") is False
        assert outage.reason == reason
        assert outage.end("%s works", "it") is True
        assert outage.reason is None
    assert lines() == [
        ("WARNING", "it fails: first"),
        ("INFO", "it works"),
        ("WARNING", "it fails: second"),
        ("INFO", "it works"),
    ]


def test_the_levels_are_chosen(lines):
    """An outage may be an error."""
    outage = OutageLog(LOG, begins=logging.ERROR, ends=logging.WARNING)
    outage.begin("gone", "gone")
    outage.end("back")
    assert [level for level, _ in lines()] == ["ERROR", "WARNING"]


def test_a_new_reason_is_logged_on_request(lines):
    """The end is logged once all the same."""
    outage = OutageLog(LOG)
    outage.begin("a", "because a")
    assert outage.begin("b", "because b", again=True) is True
    assert outage.reason == "b"
    outage.end("over")
    outage.end("over")
    assert [line for _, line in lines()] == ["because a", "because b", "over"]


def test_the_repr_states_the_reason():
    outage = OutageLog(LOG)
    assert repr(outage) == "<OutageLog: no outage>"
    outage.begin("disk full", "no")
    assert repr(outage) == "<OutageLog: disk full>"
