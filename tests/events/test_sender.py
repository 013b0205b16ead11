"""The sender: one request for a batch, or none, and what came of it."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from relay.errors import UpstreamUnavailable
from relay.events.sender import SMALL, Attempt, BatchSender
from relay.events.store import Batch
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventsEndpoint, Partition, Receipt

SPEC = EnvironmentSpec("prod", SDKKey("sdk-prod"))
PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
DEEP = b"[" * 200_000 + b"]" * 200_000


class RecordingUpstream:
    """Records posts; answers each in the same way."""

    def __init__(self, answer: Receipt | Exception) -> None:
        self.posts: list[tuple[str, bytes]] = []
        self._answer = answer

    async def post(self, url, body, *, headers, within):
        self.posts.append((url, gzip.decompress(body)))
        await asyncio.sleep(0)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def sender(answer=Receipt(202), spec=SPEC):  # noqa: B008 - frozen
    upstream = RecordingUpstream(answer)
    return BatchSender(upstream, "http://events/base/", lambda _: spec, 1.0), upstream.posts


def batch(bodies, partition=PARTITION):
    return Batch(partition, "the-id", len(bodies), 1.0)


@pytest.mark.parametrize(
    ("bodies", "sent"),
    [
        ([b" [1 , 2] "], b" [1 , 2] "),
        ([b" [1 , 2] ", b"[3]"], b"[1 , 2,3]"),
        ([b'["%s"]' % (b"x" * SMALL), b"[3]"], b'["%s",3]' % (b"x" * SMALL)),
        ([DEEP], DEEP),
    ],
    ids=["alone", "joined", "large", "deep"],
)
async def test_a_batch_is_sent_in_one_request(bodies, sent):
    """One body as it is, several as one array; large ones are compressed in a thread."""
    sending, posts = sender()
    attempt = await sending.send(batch(bodies), bodies)
    assert attempt.status == 202
    assert posts == [("http://events/base/bulk", sent)]


@pytest.mark.parametrize(
    ("bodies", "malformed", "unclear"),
    [
        ([b"[1]", b"[", b"[2]", b"[NaN]"], [1, 3], False),
        ([b"["], [0], False),
        ([b"[1]", DEEP], [], True),
        ([b"[1]", DEEP, b"["], [2], True),
    ],
)
async def test_a_batch_with_a_body_that_could_spoil_others_is_not_sent(bodies, malformed, unclear):
    """The attempt says which bodies are malformed, or that one is nested too deeply to tell."""
    sending, posts = sender()
    attempt = await sending.send(batch(bodies), bodies)
    assert (list(attempt.malformed), attempt.unclear) == (malformed, unclear)
    assert attempt.status is None
    assert posts == []


async def test_diagnostics_are_not_checked():
    """They are forwarded as they are."""
    sending, posts = sender()
    partition = Partition("prod", EventsEndpoint.BULK_DIAGNOSTIC)
    assert (await sending.send(batch([b"hello"], partition), [b"hello"])).status == 202
    assert posts == [("http://events/base/diagnostic", b"hello")]


@pytest.mark.parametrize(
    ("answer", "attempt"),
    [
        (Receipt(503, retry_after=7.0), Attempt(503, "HTTP error 503", 7.0)),
        (
            UpstreamUnavailable("http://events", "no answer in time"),
            Attempt(None, "no answer in time"),
        ),
    ],
)
async def test_the_outcome_of_an_attempt(answer, attempt):
    """Status, reason and the delay that upstream asks for."""
    sending, _ = sender(answer)
    outcome = await sending.send(batch([b"[1]"]), [b"[1]"])
    assert (outcome.status, outcome.reason, outcome.retry_after) == (
        attempt.status,
        attempt.reason,
        attempt.retry_after,
    )


@pytest.mark.parametrize("spec", [None, SPEC])
async def test_without_a_credential_nothing_is_sent(spec):
    """As if upstream had refused the key; the reason names the option."""
    sending, posts = sender(spec=spec)
    attempt = await sending.send(
        batch([b"[1]"], Partition("prod", EventsEndpoint.MOBILE)), [b"[1]"]
    )
    assert attempt.status == 401
    assert attempt.reason.endswith("set mobileKey (LD_MOBILE_KEY_prod)")
    assert posts == []


async def test_upstream_s_clock_is_kept_by_environment():
    """That of its last response with a date."""
    sending, _ = sender(Receipt(202, date=5.0))
    await sending.send(batch([b"[1]"]), [b"[1]"])
    assert sending.server_times == {"prod": 5.0}
    assert repr(sending) == "<BatchSender to http://events/base/>"
