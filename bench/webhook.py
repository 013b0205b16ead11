"""From a webhook to the database: a polled upstream that is current, a Valkey, and a stopwatch."""

import hashlib
import hmac
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import redis

from bench import data
from bench.databases import Valkey
from bench.servers import SDK_KEY, Certificate, Relay, Server
from bench.table import PEER

CHANGES = 20
DATASET = "570k"
LATENCY = 0.05
"""Seconds that upstream takes to answer."""
LONGEST_PAUSE = 0.5
"""Seconds between two changes, at most: some come while the relay still puts off a further poll."""
SECRET = "bench-secret"
FIELD = data.flag_key(0)
FEATURES = "launchdarkly-main:features"
START_SECONDS = 10


def webhook(server: Server, _certificate: Certificate) -> dict[str, float]:
    """Change a flag and announce it, many times; the times beyond upstream's latency."""
    if not isinstance(server, Relay) or server.name == PEER:
        return {}  # nobody else takes webhooks
    with Valkey() as valkey, _polled() as (upstream, change):
        database = valkey.client
        given = {
            **valkey.variables,
            "DATA_SOURCE": "polling",
            "POLL_INTERVAL": "1h",
            "BASE_URI": upstream,
            "LD_PREFIX_main": "launchdarkly-main",
            "LD_PREFIX_small": "launchdarkly-small",
            "WEBHOOK_SECRET": SECRET,
        }
        with replace(server, variables={**server.variables, **given}).serve("2k") as session:
            _until(database, 1)
            url = session.url("/webhooks/launchdarkly")
            took = [_once(url, version, database, change) for version in range(2, CHANGES + 2)]
    beyond = sorted((seconds - LATENCY) * 1000 for seconds in took)
    name = "webhook → Redis beyond upstream's latency"
    return {f"{name}: worst of {CHANGES}": beyond[-1], f"{name}: p50": median(beyond)}


def _once(url: str, version: int, database: redis.Redis, change: Any) -> float:
    """Change, announce, wait; return the seconds from the announcement."""
    time.sleep(random.uniform(0, LONGEST_PAUSE))
    change(version)
    body = json.dumps({"_id": f"bench-{version}", "kind": "flag", "accesses": []}).encode()
    signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    request = Request(url, body, {"X-LD-Signature": signature}, method="POST")
    began = time.monotonic()
    with urlopen(request) as response:
        if response.status != 202:
            raise RuntimeError(f"the webhook was answered with {response.status}")
    _until(database, version)
    return time.monotonic() - began


def _until(database: redis.Redis, version: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        stored: Any = database.hget(FEATURES, FIELD)
        if stored and json.loads(stored)["version"] >= version:
            return
        time.sleep(0.001)
    raise RuntimeError(f"version {version} never came to the database")


@contextmanager
def _polled() -> Iterator[tuple[str, Any]]:
    """An upstream that is polled, and what gives its first flag a version."""
    content = data.everything(DATASET)
    current = [data.compact(content)]
    small = data.compact(data.everything("2k"))

    def change(version: int) -> None:
        content["flags"][FIELD]["version"] = version
        current[0] = data.compact(content)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(LATENCY)
            body = current[0] if self.headers["Authorization"] == SDK_KEY else small
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", change
    finally:
        server.shutdown()
        server.server_close()
