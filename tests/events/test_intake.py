"""The intake: a table of payloads and what becomes of each, partitions, and losses in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter

import pytest

from relay.errors import StoreUnavailable
from relay.events.intake import MAX_ORIGINS, DiscardingAcceptor, EventIntake
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from tests.support.clocks import SystemClock

SPEC = EnvironmentSpec("prod", SDKKey("sdk-prod"))
SCHEMA = b"x-launchdarkly-event-schema"
TAGS, WRAPPER = b"x-launchdarkly-tags", b"x-launchdarkly-wrapper"
NEW = {SCHEMA: b"4"}
BULK, DIAGNOSTIC = EventsEndpoint.BULK, EventsEndpoint.BULK_DIAGNOSTIC
EVENT = {"kind": "custom", "key": "k", "user": {"key": "anna"}, "creationDate": 1}


class Acceptor:
    """Accepts payloads, unless it is full."""

    def __init__(self) -> None:
        self.payloads: list[EventPayload] = []
        self.full = False

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        if self.full:
            raise StoreUnavailable("full")
        self.payloads.append(payload)
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    def server_time(self, _environment: str) -> float:
        return 0.0


@pytest.fixture
def acceptor():
    return Acceptor()


@pytest.fixture
def unusable():
    return Counter()


@pytest.fixture
def intake(acceptor, unusable):
    return EventIntake(acceptor, unusable)


@pytest.mark.parametrize(
    ("endpoint", "headers", "body", "kept", "lost"),
    [
        (BULK, NEW, b'[{"kind":"x"}]', True, 0),
        (BULK, NEW, b" [1] ", True, 0),
        (BULK, NEW, b"[{]", True, 0),  # looks like one; whether it is one is seen later
        (BULK, NEW, b" [ ] ", False, 0),
        (BULK, NEW, b"{}", False, 1),
        (BULK, NEW, b"[", False, 1),
        (BULK, {}, b"{}", False, 1),
        (BULK, {}, b"[]", False, 0),
        (DIAGNOSTIC, {}, b"{}", True, 0),
        (DIAGNOSTIC, {}, b"hello", True, 0),
    ],
)
async def test_payloads_that_look_like_arrays_are_accepted(
    intake, acceptor, unusable, *, endpoint, headers, body, kept, lost
):
    """Verbatim; empty ones are dropped, others counted. Any diagnostic is accepted."""
    await intake.accept(SPEC, endpoint, headers, body)
    assert [payload.body for payload in acceptor.payloads] == [body] * kept
    assert unusable["prod"] == lost


@pytest.mark.parametrize(
    ("headers", "plain"),
    [
        (NEW, True),
        ({SCHEMA: b"03"}, True),
        ({SCHEMA: b"+4"}, True),
        ({SCHEMA: b"2"}, False),
        ({SCHEMA: b"1"}, False),
        ({SCHEMA: b"four"}, False),
        ({}, False),
        (NEW | {b"x-launchdarkly-unsummarized": b"true"}, False),
    ],
)
async def test_events_of_old_schemas_are_summarised(intake, acceptor, headers, plain):
    """Before they are accepted, under the schema of summaries; those of later ones are not read."""
    body = json.dumps([EVENT]).encode()
    assert (intake.accept_plain(SPEC, BULK, headers, body) is not None) is plain
    acceptor.payloads.clear()
    await intake.accept(SPEC, BULK, headers, body)
    (payload,) = acceptor.payloads
    assert (payload.body == body) is plain
    kinds = [event["kind"] for event in json.loads(payload.body)]
    assert kinds == (["custom"] if plain else ["index", "custom"])


async def test_contexts_are_introduced_again_if_their_payload_was_refused(intake, acceptor):
    """Upstream has not got the index event."""
    body = json.dumps([EVENT]).encode()
    acceptor.full = True
    with pytest.raises(StoreUnavailable):
        await intake.accept(SPEC, BULK, {}, body)
    acceptor.full = False
    for _ in range(2):
        await intake.accept(SPEC, BULK, {}, body)
    first, second = (json.loads(payload.body) for payload in acceptor.payloads)
    assert [event["kind"] for event in first] == ["index", "custom"]
    assert [event["kind"] for event in second] == ["custom"]


@pytest.mark.parametrize(
    ("endpoint", "headers", "partition"),
    [
        (BULK, NEW, Partition("prod", BULK, 4)),
        (BULK, {}, Partition("prod", BULK, 1)),
        (BULK, NEW | {TAGS: b"a/b", WRAPPER: b"w/1"}, Partition("prod", BULK, 4, "a/b", "w/1")),
        (DIAGNOSTIC, NEW | {TAGS: b"a/b"}, Partition("prod", DIAGNOSTIC)),
    ],
)
def test_headers_make_the_partition(intake, endpoint, headers, partition):
    """Of diagnostics only the endpoint counts."""
    assert intake.partition(SPEC, endpoint, headers) == partition


def test_the_number_of_partitions_is_bounded_in_each_environment(intake, caplog):
    """Tags of further senders are left out, which is logged once; forgetting begins anew."""
    other = EnvironmentSpec("other", SDKKey("sdk-other"))

    def tags_of(number, spec=SPEC):
        return intake.partition(spec, BULK, NEW | {TAGS: b"%d" % number}).tags

    assert [tags_of(n) for n in range(MAX_ORIGINS)] == [str(n) for n in range(MAX_ORIGINS)]
    assert [tags_of(n) for n in (MAX_ORIGINS, MAX_ORIGINS + 1, 0)] == ["", "", "0"]
    assert tags_of(MAX_ORIGINS, other) == str(MAX_ORIGINS)
    assert caplog.text.count("kinds of senders") == 1
    intake.forget("prod")
    assert tags_of(MAX_ORIGINS) == str(MAX_ORIGINS)


async def test_what_cannot_be_used_is_logged_at_most_once_a_minute(intake, caplog):
    """With the number since the last line, for each environment."""
    with SystemClock() as system, caplog.at_level(logging.WARNING):
        for pause in (0, 1, 58, 2):
            system.skip(pause)
            await intake.accept(SPEC, BULK, NEW, b"{}")
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(",")[0].rpartition(" ")[2] for text in said] == ["1", "3"]


async def test_events_in_the_url_of_an_image_have_no_id(intake, acceptor, unusable):
    """They come from browsers, in schema 3."""
    for body in (b"[1]", b"[]", b"{}"):
        await intake.accept_image(SPEC, body)
    (payload,) = acceptor.payloads
    assert payload.partition == Partition("prod", EventsEndpoint.CLIENT_SIDE, 3)
    assert payload.payload_id == ""
    assert unusable["prod"] == 1


async def test_payloads_are_discarded_where_there_is_no_upstream(acceptor, unusable):
    """Counted, whatever they hold."""
    discarded = Counter()
    discarding = EventIntake(DiscardingAcceptor(discarded), unusable)
    assert discarding.enabled
    assert discarding.discard("prod")
    await discarding.accept(SPEC, BULK, NEW, b"[1]")
    assert discarded == Counter(prod=2)
    assert not EventIntake(acceptor, unusable).discard("prod")


async def test_nothing_is_accepted_while_events_are_disabled(unusable):
    """No payload, in any form."""
    disabled = EventIntake(None, unusable)
    assert not disabled.enabled
    assert disabled.accept_plain(SPEC, BULK, NEW, b"[1]") is None
    assert not disabled.discard("prod")
    await disabled.accept(SPEC, BULK, {}, json.dumps([EVENT]).encode())


@pytest.mark.parametrize(
    ("value", "plausible"),
    [(b"a-1", True), (b"~" * 100, True), (b"", False), (b"~" * 101, False), (b"a b", False)],
)
async def test_payload_ids_are_short_and_printable(intake, acceptor, value, plausible):
    """Others are ignored."""
    await intake.accept(SPEC, BULK, NEW | {b"x-launchdarkly-payload-id": value}, b"[1]")
    assert acceptor.payloads[0].payload_id == (value.decode() if plausible else "")
