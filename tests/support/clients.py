"""LaunchDarkly's client-side SDKs, unmodified, that stream: in Node, and on pages in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from tests.support.browser import browsing
from tests.support.sdk import PACKAGES, PATIENCE, NodeSDK, SDKFailed, Setup

MODULES = PACKAGES / "node_modules"
CLIENTS = ["client", "v3", "v4", "react-native"]
"""Node client, the two lines of the browser SDK, and React Native bundled for a browser."""

_SCRIPTS = {
    "v3": MODULES / "launchdarkly-js-client-sdk/dist/ldclient.min.js",
    "v4": MODULES / "@launchdarkly/js-client-sdk/dist/index.js",
}
_SERVE = """
const silent = { debug() {}, info() {}, warn() {}, error() {} };
// SDKs poll every 30 s at the least; for a test that cannot wait, the clock runs faster then.
for (const name of ['setTimeout', 'setInterval']) {
  const original = globalThis[name];
  globalThis[name] = (callback, delay, ...rest) => {
    const polls = delay > 20_000 && delay <= 30_000; // less the time that the last poll took
    return original(callback, polls ? 300 : delay, ...rest);
  };
}
async function serve(operations) {
  for (;;) {
    const { operation, ...what } = await (await fetch('/next')).json();
    let answer;
    try {
      answer = { result: (await operations[operation](what)) ?? null };
    } catch (e) {
      answer = { error: String(e?.message ?? e) };
    }
    await fetch('/answer', { method: 'POST', body: JSON.stringify(answer) });
  }
}
"""
_PAGES = {
    "v3": """<script src="/sdk.js"></script><script type="module">
const options = { baseUrl: RELAY, streamUrl: RELAY, eventsUrl: RELAY, logger: silent };
Object.assign(options, { sendEvents: false, diagnosticOptOut: true, streaming: true });
Object.assign(options, { fetchGoals: false, streamReconnectDelay: 50, hash: HASH || undefined }, MORE);
const client = LDClient.initialize(KEY, CONTEXT, options);
client.on('error', () => {});
serve({
  ready: () => client.waitForInitialization(),
  value: ({ flag, fallback }) => client.variation(flag, fallback),
  identify: ({ context, hash }) => client.identify(context, hash || undefined).then(() => null),
});
</script>""",
    "v4": """<script type="module">
import { createClient } from '/sdk.js';
const options = { baseUri: RELAY, streamUri: RELAY, eventsUri: RELAY, logger: silent };
Object.assign(options, { sendEvents: false, diagnosticOptOut: true, streaming: true });
Object.assign(options, { fetchGoals: false, streamInitialReconnectDelay: 0.05 }, MORE);
const client = createClient(KEY, CONTEXT, options);
const started = client.start({ identifyOptions: HASH ? { hash: HASH } : {} });
serve({
  async ready() {
    const { status, error } = await started;
    if (status !== 'complete') throw new Error(`${status} ${error?.message}`);
  },
  value: ({ flag, fallback }) => client.variation(flag, fallback),
  async identify({ context, hash }) {
    const { status } = await client.identify(context, hash ? { hash } : {});
    if (status !== 'completed') throw new Error(status);
  },
});
</script>""",
    "react-native": """<script type="module">
import { AutoEnvAttributes, ReactNativeLDClient } from '/sdk.js';
const options = { baseUri: RELAY, streamUri: RELAY, eventsUri: RELAY, logger: silent };
Object.assign(options, { sendEvents: false, diagnosticOptOut: true });
Object.assign(options, { streamInitialReconnectDelay: 0.05 }, MORE);
const client = new ReactNativeLDClient(KEY, AutoEnvAttributes.Disabled, options);
const started = client.identify(CONTEXT);
started.catch(() => {});
serve({
  ready: () => started.then(() => null),
  value: ({ flag, fallback }) => client.variation(flag, fallback),
  identify: ({ context }) => client.identify(context).then(() => null),
});
</script>""",
}


class Client(Protocol):
    """One SDK, which serves one context at a time."""

    async def ready(self) -> None:
        """Wait until it has initialised.

        Raises:
            SDKFailed: it gave up.
        """

    async def value(self, flag: str, context: dict = ..., fallback: Any = None) -> Any:
        """Evaluate a flag; the context is that of the SDK."""

    async def identify(self, context: dict) -> None:
        """Change the context."""


@asynccontextmanager
async def client(
    name: str, key: str, url: str, context: dict, folder: Path, *, proof: str = "", **more: Any
) -> AsyncGenerator[Client, None]:
    """An SDK of `CLIENTS` that streams unless told otherwise, until left.

    Args:
        name: of the SDK.
        key: client-side ID, or mobile key for React Native.
        url: of the relay.
        context: whom it serves first.
        folder: an empty folder.
        proof: the hash of secure mode.
        more: options of the SDK, by its own names for them.
    """
    if name == "client":
        async with NodeSDK(
            "client", Setup(key, url, context=context, proof=proof, more=more)
        ) as sdk:
            yield sdk
        return
    script = _bundled(folder) if name == "react-native" else _SCRIPTS[name]
    values = {"KEY": key, "RELAY": url, "CONTEXT": context, "HASH": proof, "MORE": more}
    constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items())
    html = f"<!doctype html><meta charset=utf-8><script>{constants}{_SERVE}</script>{_PAGES[name]}"
    page = _Page(html, script)
    # A phone knows no origins, so the routes of mobile SDKs know nothing of CORS.
    options = ("--disable-web-security",) if name == "react-native" else ()
    async with page.serving() as origin, browsing(f"{origin}/", folder, *options):
        yield page


def _bundled(folder: Path) -> Path:
    bundle = folder / "react-native.js"
    subprocess.run(["node", PACKAGES / "bundle.mjs", bundle], check=True, timeout=60)
    return bundle


class _Page:
    """A page that does what it is told, one operation after the other."""

    def __init__(self, html: str, script: Path) -> None:
        self._html = html
        self._script = script
        self._commands: asyncio.Queue[dict] = asyncio.Queue()
        self._answers: asyncio.Queue[dict] = asyncio.Queue()
        self._asked = asyncio.Lock()

    async def ready(self) -> None:
        await self._ask("ready")

    async def value(self, flag: str, context: dict | None = None, fallback: Any = None) -> Any:
        return await self._ask("value", flag=flag, fallback=fallback)

    async def identify(self, context: dict, proof: str = "") -> None:
        await self._ask("identify", context=context, hash=proof)

    async def _ask(self, operation: str, **what: Any) -> Any:
        async with self._asked, asyncio.timeout(2 * PATIENCE):
            await self._commands.put({"operation": operation, **what})
            answer = await self._answers.get()
        if "error" in answer:
            raise SDKFailed(answer["error"])
        return answer["result"]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The page has an origin until left."""
        app = web.Application()
        app.router.add_get("/", self._show)
        app.router.add_get("/sdk.js", self._load)
        app.router.add_get("/next", self._next)
        app.router.add_post("/answer", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://localhost:{runner.addresses[0][1]}"
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await runner.cleanup()

    async def _show(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text=self._html, content_type="text/html")

    async def _load(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(self._script, headers={"Content-Type": "text/javascript"})

    async def _next(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(await self._commands.get())

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await self._answers.put(await request.json())
        return web.Response()
