"""The delivery policy: tables of responses, delays, targets and headers."""

from __future__ import annotations

import pytest

from relay.backoff import Backoff
from relay.events.policy import (
    ForwarderTimings,
    Step,
    delay_after,
    headers,
    may_have_arrived,
    missing_setting,
    next_step,
    step_if_bad,
    target,
)
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventsEndpoint, Partition

KEY, MOBILE = "sdk-prod", "mob-prod"
SPEC = EnvironmentSpec("prod", SDKKey(KEY), MobileKey(MOBILE), EnvironmentID("id-prod"))
BARE = EnvironmentSpec("bare", SDKKey("sdk-bare"))


@pytest.mark.parametrize(
    ("status", "payloads", "failures", "step"),
    [
        *((status, 3, 0, Step.DONE) for status in (200, 202, 204)),
        *((status, 3, 0, Step.RETRY) for status in (None, 301, 307, 407, 408, 429, 500, 503, 599)),
        *((status, 3, 0, Step.REFUSED) for status in (401, 402, 403, 404, 405, 410, 418)),
        *((413, payloads, failures, Step.SPLIT) for payloads in (1, 3) for failures in (0, 1)),
        *((400, payloads, 0, Step.RETRY) for payloads in (1, 3)),
        (400, 3, 1, Step.SPLIT),
        (400, 1, 1, Step.REJECT),
    ],
)
def test_the_next_step_after_a_response(status, payloads, failures, step):
    """Transient failures are retried; only a payload that is proven bad is quarantined."""
    assert next_step(status, payloads, failures) is step


@pytest.mark.parametrize(
    ("status", "payloads", "failures", "step", "if_bad"),
    [
        *((status, 3, 0, Step.RETRY, None) for status in (None, 400, 408, 429, 503)),
        *((202, 3, failures, Step.DONE, None) for failures in (0, 1)),
        (401, 3, 1, Step.REFUSED, None),
        *((413, n, f, Step.REJECT, Step.SPLIT) for n in (1, 3) for f in (0, 1)),
        (400, 3, 1, Step.REJECT, Step.SPLIT),
        (400, 1, 1, Step.REJECT, Step.QUARANTINE),
    ],
)
def test_the_next_step_of_a_batch_that_may_have_arrived(status, payloads, failures, step, if_bad):
    """It is not split before it is proven bad: its halves could arrive a second time."""
    assert next_step(status, payloads, failures, maybe_delivered=True) is step
    assert if_bad is None or step_if_bad(status, payloads) is if_bad


@pytest.mark.parametrize(
    ("status", "unclear"),
    [(None, True), *((s, s >= 500) for s in (301, 400, 401, 408, 413, 429, 500, 502, 503, 504))],
)
def test_upstream_may_have_a_batch_without_an_answer(status, unclear):
    """A server's error may be that of a proxy which has lost the answer; other statuses are clear."""
    assert may_have_arrived(status) is unclear


@pytest.mark.parametrize(
    ("endpoint", "path", "key"),
    [
        (EventsEndpoint.BULK, "/bulk", KEY),
        (EventsEndpoint.MOBILE, "/mobile", MOBILE),
        (EventsEndpoint.CLIENT_SIDE, "/events/bulk/id-prod", None),
        (EventsEndpoint.BULK_DIAGNOSTIC, "/diagnostic", KEY),
        (EventsEndpoint.MOBILE_DIAGNOSTIC, "/mobile/events/diagnostic", MOBILE),
        (EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC, "/events/diagnostic/id-prod", None),
    ],
)
def test_paths_and_keys_of_payloads(endpoint, path, key):
    """Each kind of credential has its path; the client-side ID is no key."""
    said = {} if key is None else {"Authorization": key}
    assert target(Partition("prod", endpoint), SPEC) == (path, said)
    assert target(Partition("prod", endpoint), None) is None
    server = endpoint in (EventsEndpoint.BULK, EventsEndpoint.BULK_DIAGNOSTIC)
    assert (target(Partition("bare", endpoint), BARE) is not None) is server


def test_only_known_headers_are_sent():
    """Schema and id of analytics; tags and wrapper where an SDK gave them; of diagnostics none."""
    usual = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert headers(Partition("e", EventsEndpoint.MOBILE, 3), "i") == usual | {
        "X-LaunchDarkly-Event-Schema": "3",
        "X-LaunchDarkly-Payload-ID": "i",
    }
    full = headers(Partition("e", EventsEndpoint.BULK, 4, "a/b", "w/1"), "i")
    assert (full["X-LaunchDarkly-Tags"], full["X-LaunchDarkly-Wrapper"]) == ("a/b", "w/1")
    assert headers(Partition("e", EventsEndpoint.BULK_DIAGNOSTIC), "i") == usual


def test_delays_grow_to_five_minutes():
    """From a second, or after refusals from five seconds."""
    timings = ForwarderTimings()
    assert [timings.backoff.delay(n) for n in (0, 1, 2, 14, 15)] == [1, 1.5, 2.25, 1.5**14, 300]
    assert [timings.refused.delay(n) for n in range(8)] == [5, 10, 20, 40, 80, 160, 300, 300]


PACE = ForwarderTimings(between=0.5, backoff=Backoff(first=1.0, growth=2.0, longest=60.0))


@pytest.mark.parametrize(
    ("step", "circumstances", "delay"),
    [
        (Step.DONE, {"took": 0.1}, 0.1),
        (Step.DONE, {"took": 9.0, "retry_after": 50.0}, 0.5),
        (Step.SPLIT, {"failures": 7, "took": 9.0}, 0.0),
        (Step.QUARANTINE, {"failures": 7}, 0.5),
        (Step.SUSPECT, {"failures": 7}, 0.5),
        *((Step.RETRY, {"failures": n}, 2.0**n) for n in range(4)),
        *((Step.WAIT, {"failures": n}, 2.0**n) for n in range(4)),
        (Step.RETRY, {"failures": 20}, 60.0),
        (Step.RETRY, {"failures": 3, "chance": 1.0}, 4.0),
        (Step.RETRY, {"retry_after": 30.0}, 30.0),
        (Step.RETRY, {"retry_after": 3600.0}, 60.0),
        (Step.RETRY, {"failures": 4, "retry_after": 3.0}, 16.0),
        *((Step.REFUSED, {"failures": n}, 5.0 * 2**n) for n in range(3)),
    ],
)
def test_the_delay_after_a_step(step, circumstances, delay):
    """A backlog follows upstream's pace; failures back off; halves and others wait for nothing."""
    assert delay_after(step, PACE, **circumstances) == delay


@pytest.mark.parametrize(
    ("endpoint", "setting"),
    [
        (EventsEndpoint.BULK, ": set sdkKey (LD_ENV_prod)"),
        (EventsEndpoint.MOBILE_DIAGNOSTIC, ": set mobileKey (LD_MOBILE_KEY_prod)"),
        (EventsEndpoint.CLIENT_SIDE, ": set envId (LD_CLIENT_SIDE_ID_prod)"),
    ],
)
def test_the_hint_to_a_missing_credential(endpoint, setting):
    """The option and its variable."""
    assert missing_setting(Partition("prod", endpoint)) == setting
