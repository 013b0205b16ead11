"""LaunchDarkly's browser SDKs in a real browser, on a page of another origin."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support import data
from tests.support.browser import page
from tests.support.process import PATIENCE, RelayProcess
from tests.support.sdk import PACKAGES
from tests.support.serving import SDK_KEY
from tests.support.upstream import Posted, ScriptedUpstream

pytestmark = [pytest.mark.sdk, pytest.mark.usefixtures("packages")]
MODULES = PACKAGES / "node_modules"
V3 = MODULES / "launchdarkly-js-client-sdk/dist/ldclient.min.js"
V4 = MODULES / "@launchdarkly/js-client-sdk/dist/index.js"

# Events only: what flags a page gets is `test_client_side_evaluation.py`'s business.
PAGES = {
    "v3": """<script src="/sdk.js"></script><script>
const options = { baseUrl: RELAY, streamUrl: RELAY, eventsUrl: RELAY, fetchGoals: false, bootstrap: FLAGS };
const client = LDClient.initialize('id-main', ANNA, options);
client.on('ready', () => {
  client.variation('lamp', 'fallback');
  client.track('tracked', EXACT, 1.5);
  client.flush();
});
</script>""",
    "v4": """<script type="module">
import { createClient } from '/sdk.js';
const options = { baseUri: RELAY, streamUri: RELAY, eventsUri: RELAY, fetchGoals: false };
const client = createClient('id-main', ANNA, options);
await client.start({ bootstrap: FLAGS });
client.variation('lamp', 'fallback');
client.track('tracked', EXACT, 1.5);
client.flush();
</script>""",
}
EXACT = {"big": 9007199254740991, "small": 1.5e-7, "text": 'ü "<&>" \u2028', "list": [None, True]}
VALUES = {
    "ANNA": {"kind": "user", "key": "anna"},
    "EXACT": EXACT,
    "FLAGS": {
        "lamp": "on",
        "$flagsState": {"lamp": {"version": 1, "variation": 0}},
        "$valid": True,
    },
}


def events(upstream: ScriptedUpstream) -> list[dict]:
    """All events that upstream took."""
    return [event for post in posts(upstream) for event in post.events]


def posts(upstream: ScriptedUpstream) -> list[Posted]:
    return [post for post in upstream.accepted if post.path == "/events/bulk/id-main"]


@pytest.mark.parametrize("version", PAGES)
async def test_the_events_of_a_browser_arrive(version, tmp_path: Path):
    """Preflights are answered, events go under the client-side ID, diagnostics beside them."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, data.all_data())
        relay = RelayProcess(
            tmp_path,
            LD_ENV_main=SDK_KEY,
            LD_CLIENT_SIDE_ID_main="id-main",
            STREAM_URI=upstream.url,
            EVENTS_HOST=upstream.url,
            USE_EVENTS="true",
            EVENTS_FLUSH_INTERVAL="50ms",
        )
        values = {"RELAY": relay.url, **VALUES}
        constants = "".join(
            f"const {name} = {json.dumps(value)};" for name, value in values.items()
        )
        html = f"<!doctype html><meta charset=utf-8><script>{constants}</script>{PAGES[version]}"
        script = V3 if version == "v3" else V4
        async with relay, page(html, {"/sdk.js": script}, tmp_path):
            try:
                async with asyncio.timeout(2 * PATIENCE):
                    while not any(e.get("key") == "tracked" for e in events(upstream)):
                        await upstream.posted(len(upstream.posts) + 1)
                        await asyncio.sleep(0.05)  # until it has been answered
            except TimeoutError:
                raise AssertionError((tmp_path / "browser.log").read_text()[-3000:]) from None
    assert all("Authorization" not in post.headers for post in posts(upstream))
    (tracked,) = (event for event in events(upstream) if event.get("key") == "tracked")
    assert (tracked["data"], tracked["metricValue"]) == (EXACT, 1.5)
    assert any(post.path == "/events/diagnostic/id-main" for post in upstream.accepted)
