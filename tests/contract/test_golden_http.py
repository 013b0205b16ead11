"""The reference's recorded answers, at both doors, but for the differences that are wanted.

`tests/golden/http.jsonl` holds the recordings that belong to the endpoints offered so far: status,
polling, streams of server-side SDKs; and of every endpoint refusals, methods, paths and preflights.
`client-side.jsonl` holds those of evaluation for client-side SDKs, and of goals.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web

from relay import __version__
from relay.build.relay import build
from relay.config.load import load
from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind
from relay.model.item import Kind, parse
from relay.model.payload import Payload
from relay.protocol.prometheus import CONTENT_TYPE
from relay.relay import Relay
from relay.server.options import ServerOptions
from relay.stores import Stored, StoreState, StoreStatus
from relay.web.cors import ALLOWED_HEADERS
from relay.web.endpoints.goals import GoalsHandler
from relay.web.handlers import Handlers
from relay.web.resources import MIN_COMPRESSED
from tests.support.contracts import MemoryMirror
from tests.support.serving import Address, Reply, ask, serving_site, site_of, until
from tests.support.upstream import ScriptedUpstream, body, filtered, status

GOLDEN = Path(__file__).parent.parent / "golden"
SETUPS = json.loads((GOLDEN / "setups.json").read_text("utf-8"))
WHOLE = json.loads((GOLDEN / "environment.json").read_text("utf-8"))
SIX = ("lamp", "crews", "kettle-off", "gone", "circle", "circle-big")
SOME = {kind: {k: item for k, item in WHOLE[kind].items() if k in SIX} for kind in WHOLE}

OURS = ("dataAge", "items", "streams", "requests", "newStreams", "events", "upstream", "fdv2")
"""Members that the reference's `/status` does not have."""

MAIN = "5ca1ab1e00000000000c0001"
"""The client-side ID of the environment that nearly all recordings ask."""

NOT_MEANT = ("content-length", "transfer-encoding", "x-from-cache", "age")
"""The latter two depend on what was asked before."""

PING_ROUTES = ("/ping/", "/eval/", "/meval", "/mping")


@dataclass(frozen=True, eq=False)
class Recording:
    """One request to the reference, and what it answered."""

    name: str
    setup: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    reply: Reply
    chunked: bool = False

    @property
    def short(self) -> str:
        """The name without that of the setup."""
        return self.name.removeprefix(f"{self.setup}: ")

    @property
    def asked(self) -> dict[str, str]:
        return {name.lower(): value for name, value in reversed(self.headers)}


def recordings() -> list[Recording]:
    files = (GOLDEN / "http.jsonl", GOLDEN / "client-side.jsonl")
    lines = [line for file in files for line in file.read_text("utf-8").split("\n")]
    return [recording(json.loads(line)) for line in lines if line]


def recording(line: dict) -> Recording:
    asked, got = line["request"], line["response"]
    headers = {name.lower(): value for name, value in got["headers"] if name != "Date"}
    reply = Reply(got["status"], headers, got.get("body", "").encode())
    return Recording(
        line["name"],
        line["setup"],
        asked["method"],
        asked["path"],
        tuple((name, value) for name, value in asked["headers"]),
        asked.get("body", "").encode(),
        reply,
        asked.get("chunked", False),
    )


RECORDINGS = recordings()


# What is wanted otherwise. The numbers are the rows of the table of wanted differences that the
# recordings came with; DESIGN and newer-versions are sections of the specification.

Change = Callable[[Recording, Reply], Reply | None]
"""Returns what we answer instead; None if the difference does not concern the recording."""


def with_headers(reply: Reply, **headers: str) -> Reply:
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return replace(reply, headers={**reply.headers, **more})


def without_headers(reply: Reply, *names: str) -> Reply:
    return replace(reply, headers={n: v for n, v in reply.headers.items() if n not in names})


EVALUATION = re.compile("/m?sdk/evalx/")
BODY_ROUTE = re.compile(r"/m?sdk/evalx/([0-9a-f]{24}/)?(context|user)s?(\?|$)")


def evaluated(r: Recording, reply: Reply) -> dict | None:
    """The results of flags that an answer holds; None if it holds none."""
    if not EVALUATION.match(r.path) or reply.status != 200 or not reply.body:
        return None
    return json.loads(reply.body)


def context_of(r: Recording) -> Any:
    """The context in the body, or at the end of the path; None if there is none that is valid."""
    text = r.body
    if r.method == "GET":
        segment = unquote(r.path.split("?")[0].rpartition("/")[2]).translate(ALPHABET)
        text = base64.urlsafe_b64decode(segment.rstrip("=") + "==")
    return json.loads(text.decode(errors="replace"))


ALPHABET = str.maketrans("+/", "-_")


def understood(r: Recording) -> Reply:
    """Return the reference's reply to the same question in a form that it understands."""
    audience, context = EVALUATION_PATH.match(r.path), context_of(r)
    assert audience
    same = [
        k
        for k in RECORDINGS
        if (k.setup, k.method, k.asked.get("origin")) == ("ready", "GET", None)
        and "?" not in k.path
        and k.path.startswith(audience[0])
        and evaluated(k, k.reply)
        and context_of(k).get("key") == context["key"]
    ]
    exactly = [k for k in same if context_of(k) == context]
    reply = (exactly or same)[0].reply  # no flag asks for what the others have besides
    if r.method == "GET" or "access-control-allow-methods" not in reply.headers:
        return reply
    return with_headers(reply, access_control_allow_methods="REPORT,OPTIONS")


EVALUATION_PATH = re.compile("/m?sdk/evalx/([0-9a-f]{24}/)?")


def rows_1_2_and_6(r: Recording, reply: Reply) -> Reply | None:
    """Parameters of the content type, plural names, each spelling of base64 that a path can have."""
    typed = reply.status == 415 and r.short.startswith("REPORT content-type 'application/json;")
    plural = reply.status == 404 and "documented plural" in r.short
    encoded = reply.status == 400 and re.match("base64: (half padding|standard alphabet)", r.short)
    return understood(r) if typed or plural or encoded else None


def row_3(r: Recording, reply: Reply) -> Reply | None:
    """Values are exactly upstream's."""
    results = evaluated(r, reply)
    if results is None:
        return None
    for key, result in results.items():
        if result["variation"] is not None:
            result["value"] = WHOLE["flags"][key]["variations"][result["variation"]]
    return replace(reply, body=json.dumps(results).encode())


def tagged(r: Recording, reply: Reply) -> Reply | None:
    """Evaluations have an ETag, and are compressed where that is worth it and accepted."""
    results = evaluated(r, reply)
    if results is None:
        return None
    reply = with_headers(reply, etag="<digest>")
    if len(compact(results)) < MIN_COMPRESSED:
        return reply
    reply = with_headers(reply, vary="Accept-Encoding")
    asked = "gzip" in r.asked.get("accept-encoding", "")
    return with_headers(reply, content_encoding="gzip") if asked else reply


def posted(r: Recording, reply: Reply) -> Reply | None:
    """Where a context can be in the body, POST is understood as well as REPORT."""
    if not BODY_ROUTE.match(r.path):
        return None
    if r.method == "POST":
        return Reply(400, {"content-type": "application/json"}, b'{"message":"<any>"}')
    if "access-control-allow-methods" not in reply.headers:
        return None
    return with_headers(reply, access_control_allow_methods="REPORT,POST,OPTIONS")


def only_known_headers(_r: Recording, reply: Reply) -> Reply | None:
    """Of the headers that LaunchDarkly gave with goals those that matter."""
    return without_headers(reply, "x-upstream", "server") if "x-upstream" in reply.headers else None


def verbatim(kind: str, key: str) -> object:
    """An item as upstream wrote it, with the `clientSide` that old SDKs need."""
    item = dict(WHOLE[kind][key])
    if kind == "flags" and "clientSide" not in item and "clientSideAvailability" in item:
        item["clientSide"] = item["clientSideAvailability"].get("usingEnvironmentId", False)
    return item


def row_4(r: Recording, reply: Reply) -> Reply | None:
    """Items go out as they came, unknown properties and number spellings included (also row 3)."""
    if reply.status != 200:
        return None
    if r.path.startswith(("/all", "/flags")) and reply.body:
        data = json.loads(reply.body.decode().split("data: ", 1)[1])
        inner = data.get("data", {"flags": data})
        whole = {kind: {k: verbatim(kind, k) for k in inner[kind]} for kind in inner}
        now = {"path": "/", "data": whole} if "data" in data else whole["flags"]
        return replace(reply, body=b"event: put\ndata: " + json.dumps(now).encode() + b"\n\n")
    if match := re.match(r"/sdk/(flags|segments)/([^?]*)", r.path):
        key = json.loads(reply.body)["key"]
        return replace(reply, body=json.dumps(verbatim(match[1], key)).encode())
    if r.path.startswith("/sdk/flags"):
        whole = {key: verbatim("flags", key) for key in json.loads(reply.body)}
        return replace(reply, body=json.dumps(whole).encode())
    return None


def row_7(r: Recording, reply: Reply) -> Reply | None:
    """Allow-Methods also for diagnostics of browsers."""
    if not re.match("/events/diagnostic/.", r.path) or reply.status == 405:
        return None
    return with_headers(reply, access_control_allow_methods="POST,OPTIONS")


def row_9(r: Recording, reply: Reply) -> Reply | None:
    """Refusals carry all CORS headers, so that browser code can read the status."""
    if reply.status not in (404, 503) or "access-control-allow-methods" not in reply.headers:
        return None
    return with_headers(
        reply,
        access_control_allow_origin=r.asked.get("origin", "*"),
        access_control_allow_credentials="false",
        access_control_max_age="300",
        access_control_allow_headers=",".join(ALLOWED_HEADERS),
        access_control_expose_headers="Date",
    )


def row_10(r: Recording, reply: Reply) -> Reply | None:
    """The answer depends on the origin, and says so."""
    if "access-control-allow-methods" not in reply.headers:
        return None
    vary = reply.headers.get("vary")
    return with_headers(reply, vary=f"{vary}, Origin" if vary else "Origin")


def row_11(r: Recording, reply: Reply) -> Reply | None:
    """HEAD where GET is; 405 names the methods."""
    if reply.status != 405:
        return None
    return with_headers(reply, allow=", ".join(sorted(allowed(r.path))))


def has_head(r: Recording) -> bool:
    """True if row 11 makes this an answer like that to GET."""
    return r.method == "HEAD" and "HEAD" in allowed(r.path)


def allowed(path: str) -> set[str]:
    """The methods of a path, from the reference's own table of routes."""
    for pattern, methods in METHODS.items():
        if re.match(pattern, path):
            return methods
    return {"GET", "HEAD"}


METHODS = {
    "/(bulk|diagnostic|mobile)": {"POST"},
    "/events/": {"POST", "OPTIONS"},
    "/meval$": {"REPORT"},
    "/eval/[^/]*$": {"REPORT", "OPTIONS"},
    r"/m?sdk/evalx/(context|user)s?(\?|$)": {"REPORT", "POST"},
    r"/sdk/evalx/[0-9a-f]{24}/(context|user)s?(\?|$)": {"REPORT", "POST", "OPTIONS"},
    "/(ping|eval|a|sdk/goals|sdk/evalx/[0-9a-f]{24})/": {"GET", "HEAD", "OPTIONS"},
}


def row_12(r: Recording, reply: Reply) -> Reply | None:
    """JSON errors of events are labelled as what they are."""
    if not reply.body.startswith(b'{"message"'):
        return None
    return with_headers(reply, content_type="application/json")


def with_setting(r: Recording, reply: Reply) -> Reply | None:
    """A 503 of events says which setting is missing."""
    text = b"Event proxy is not enabled for this environment"
    if reply.status != 503 or text not in reply.body:
        return None
    setting = b": set [Events] sendEvents (USE_EVENTS=true)"
    return replace(reply, body=reply.body.replace(text, text + setting))


def row_13(r: Recording, reply: Reply) -> Reply | None:
    """The standard forms of If-None-Match match, too, and a 304 carries the ETag."""
    known = r.asked.get("if-none-match", "")
    if reply.status == 304:
        return with_headers(reply, etag=known)
    etag = reply.headers.get("etag", "none")
    if not known or (known != "*" and f'"{etag}"' not in known):
        return None
    unchanged = replace(reply, status=304, body=b"")
    return without_headers(unchanged, "content-type")


def row_14(r: Recording, reply: Reply) -> Reply | None:
    """Bodies that are worth it are compressed where that is accepted; all say that they vary."""
    polled = r.path.startswith(("/sdk/flags", "/sdk/segments"))
    if not polled or "etag" not in reply.headers:
        return None
    size = len(compact(json.loads(reply.body or b"{}")))
    if size < MIN_COMPRESSED and not (reply.status == 304 and r.path == "/sdk/flags"):
        return None
    vary = reply.headers.get("vary")
    return with_headers(reply, vary=f"Accept-Encoding, {vary}" if vary else "Accept-Encoding")


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


NO_DATA = Reply(503, {"content-type": "text/plain; charset=utf-8"}, b"client was not initialized")


def rows_16_to_19(r: Recording, reply: Reply) -> Reply | None:
    """Without data: 503 for polls, and streams that wait. With data from anywhere: the data.

    The reference answers 401/404 for ever to SDKs whose key LaunchDarkly refused at start (16), 503
    though Redis has data (17), `{}` when nothing came in time (18), 500 when Redis is down (19).
    """
    if r.setup not in STATES or "unknown" in r.short:
        return None
    stored = r.setup.startswith("redis-") and r.setup != "redis-empty-timed-out"
    like = answered_like("events-off", r.short)
    if r.short.startswith("poll") and not stored:
        return NO_DATA
    if r.short.startswith("evalx") and not stored:
        return replace(like, status=503, body=NOT_READY)
    if r.short.startswith("stream") and not (stored or (reply.status == 200 and reply.body)):
        return replace(like, body=b"")
    return like if r.short.startswith(CONCERNED) else None


CONCERNED = ("poll", "stream", "evalx", "options", "goals", "invalid context")
NOT_READY = b'{"message":"Service not initialized"}'
STATES = (
    *("starting", "timed-out", "timed-out-503", "rejected-401", "rejected-403", "rejected-404"),
    *("redis-starting", "redis-timed-out", "redis-rejected", "redis-empty-timed-out", "redis-down"),
)
"""Setups in which the reference withholds something."""


def answered_like(setup: str, short: str) -> Reply:
    """Return the reference's reply to the same request in another setup."""
    return next(r.reply for r in RECORDINGS if r.setup == setup and r.short == short)


def newer_10_1(r: Recording, reply: Reply) -> Reply | None:
    """X-LD-EnvId on every answer to an environment that has an ID (newer-versions 10.1)."""
    if not asked_environment(r, reply):
        return None
    return with_headers(reply, x_ld_envid=asked_environment(r, reply))


def asked_environment(r: Recording, reply: Reply) -> str:
    if r.path.startswith(("/status", "http:")) or reply.status in (301, 401, 405):
        return ""
    if reply.status == 400 and reply.headers["content-type"] != "application/json":
        return ""
    if reply.status == 404 and reply.body:
        return ""  # no route, no such environment, or no such filter
    by_id = re.search(r"5ca1ab1e00000000000c000\d", r.path)
    by_key = re.search(r"(?:sdk|mob)-5ca1ab1e-000([12])-", r.asked.get("authorization", ""))
    return by_id[0] if by_id else f"5ca1ab1e00000000000c000{by_key[1]}" if by_key else ""


def our_status(r: Recording, reply: Reply) -> Reply | None:
    """Our version; no big segments yet; and what rows 16 to 19 mean for the state."""
    if reply.status != 200 or not re.search("/status$", r.path):
        return None
    said = json.loads(reply.body)
    said["version"] = said["clientVersion"] = __version__
    for environment in said["environments"].values():
        environment.pop("bigSegmentStatus", None)
        for part in ("connectionStatus", "dataStoreStatus"):
            environment[part]["stateSince"] = environment[part]["stateSince"] and "<ms>"
    if r.setup == "redis-down":  # row 19: upstream is well, and the relay serves from memory
        environment = said["environments"]["main"]
        environment["status"], said["status"] = "connected", "healthy"
        del environment["connectionStatus"]["lastError"]
    if r.setup == "redis-starting":  # row 17: the database is in use from the beginning
        said["environments"]["main"]["dataStoreStatus"] = store_said(StoreState.VALID)
    return replace(reply, body=json.dumps(said).encode())


def store_said(state: StoreState) -> dict[str, str]:
    where = {"database": "redis", "dbServer": "redis://redis.example:6379", "dbPrefix": "golden"}
    return {"state": state.value, "stateSince": "<ms>", **where}


def offered_now(r: Recording, reply: Reply) -> Reply | None:
    """The reference has neither polling for all SDKs nor FDv2, nor figures here."""
    if r.path == "/metrics":
        return Reply(200, {"content-type": CONTENT_TYPE}, b"<figures>")
    if r.path not in ("/sdk/latest-all", "/sdk/poll"):
        return None
    told = {
        "content-type": "application/json",
        "etag": "<digest>",
        "vary": "Accept-Encoding",
        "x-ld-envid": MAIN,
    }
    live = {
        kind: {k: verbatim(kind, k) for k, item in items.items() if not item.get("deleted")}
        for kind, items in WHOLE.items()
    }
    return Reply(200, told, compact(live))


def strict_parser(r: Recording, reply: Reply) -> Reply | None:
    """Our HTTP parser refuses method tokens that do not exist, before any routing."""
    if r.method != "report":
        return None
    told = {"content-type": "text/plain; charset=utf-8", "connection": "close"}
    return Reply(400, told, b"Invalid HTTP request received.")


DIFFERENCES: tuple[Change, ...] = (
    *(rows_16_to_19, rows_1_2_and_6, row_3, only_known_headers, tagged, posted),
    *(row_13, row_4, row_14, row_7, row_9, row_10, row_11, row_12, with_setting, newer_10_1),
    *(our_status, offered_now, strict_parser),
)
"""In the order in which they are applied."""


def expected(r: Recording) -> Reply:
    reply = without_headers(r.reply, "date")
    for difference in DIFFERENCES:
        reply = difference(r, reply) or reply
    return reply


# The relay in the states in which the recordings were made.


class RedisCopy(MemoryMirror):
    """A copy that says of itself what a Redis store would, and holds what it held."""

    def __init__(self, data: dict | None, state: StoreState) -> None:
        super().__init__()
        where = store_said(state)
        self.status = StoreStatus(
            state, time.time(), where["database"], where["dbServer"], where["dbPrefix"]
        )
        if state is StoreState.VALID:
            self.loading.set_result(Stored(payload(data)) if data else None)


def payload(data: dict) -> Payload:
    kinds = {kind.value: kind for kind in Kind}
    return Payload.of(
        parse(kinds[kind], key, json.dumps(item).encode())
        for kind, items in data.items()
        for key, item in items.items()
    )


async def goals_upstream(_request: web.Request) -> web.Response:
    """The goals in the recordings, with the headers that LaunchDarkly's had there."""
    told = {"Cache-Control": "max-age=60", "Server": "upstream", "X-Upstream": "1"}
    body = b'[{"key":"g1","kind":"pageview","urls":[]}]'
    return web.Response(body=body, content_type="application/json", headers=told)


def key_of(environment: Environment) -> str:
    return filtered(environment.spec.sdk_key.value, environment.spec.payload_filter)


def text(setup: str) -> str:
    """The data set that the upstream of a setup sends, in its own spelling."""
    if setup == "ready":
        return (GOLDEN / "environment.json").read_text("utf-8").replace("\n", "")
    return compact(SOME).decode()


def prepare(setup: str, upstream: ScriptedUpstream, environment: Environment) -> None:
    """Make the upstream do what it did in the recording, and the database hold what it held."""
    key = key_of(environment)
    refusal = re.search(r"(rejected|timed-out)-?(\d*)", setup)
    if setup in ("starting", "timed-out", "redis-starting"):
        upstream.always(key, body(b"", then="stall"))
    elif setup.startswith("redis-") and setup not in ("redis-ready", "redis-down"):
        upstream.always(key, status(401 if "rejected" in setup else 503))
    elif refusal:
        upstream.always(key, status(int(refusal[2])))
    else:
        upstream.serve(key, text(setup))
    if setup.startswith("redis-"):
        state = StoreState.INTERRUPTED if setup == "redis-down" else StoreState.VALID
        held = None if setup in ("redis-empty-timed-out", "redis-down") else SOME
        environment.mirrors = (RedisCopy(held, state),)


async def reach(setup: str, upstream: ScriptedUpstream, relay: Relay) -> None:
    """Wait until the relay is in the state of the recording."""
    environments = relay.environments.values()
    if "timed-out" in setup:
        await until(lambda: not relay.starting)
    if "rejected" in setup:
        await until(lambda: all(e.init_done.is_set() for e in environments))
    if setup in ("ready", "events-off", "filters", "redis-ready", "redis-down") or "lost" in setup:
        await until(lambda: all(e.connection.has_data for e in environments))
    if setup.startswith("redis-") and setup not in ("redis-empty-timed-out", "redis-down"):
        await until(lambda: all(e.payload is not None for e in environments))
    if "lost" in setup:
        (environment,) = environments
        upstream.always(key_of(environment), status(int(setup[-3:])))
        upstream.close_streams()
        lost = ConnectionState.OFF if setup == "lost-401" else ConnectionState.INTERRUPTED
        await until(lambda: environment.connection.state is lost)
        # The end of the stream may have been noted first: wait for the answer to the next attempt.
        await until(lambda: last_error_of(environment) is ErrorKind.ERROR_RESPONSE)
        await until(lambda: environment.connection.lasts >= relay.disconnected_after)


def last_error_of(environment: Environment) -> ErrorKind | None:
    error = environment.connection.last_error
    return error and error[0]


@asynccontextmanager
async def relay_in(setup: str, *, front: bool) -> AsyncGenerator[Address, None]:
    """The relay that the recording's variables configure, in the recording's state."""
    async with ScriptedUpstream() as upstream:
        given = SETUPS[setup]["environment variables"]
        left_out = ("REDIS", "USE_REDIS")
        variables = {name: v for name, v in given.items() if not name.startswith(left_out)}
        here = dict.fromkeys(("STREAM_URI", "CLIENT_SIDE_BASE_URI"), upstream.url)
        upstream.always("", goals_upstream)  # what has no key
        relay = build(load("", True, False, {**variables, **here}))
        for environment in relay.environments.values():
            prepare(setup, upstream, environment)
        goals = GoalsHandler(relay.fetch, upstream.url)
        site = site_of(Handlers.of(relay, goals=goals))
        async with serving_site(site, ServerOptions(0, drain=2), front=front) as port:
            await reach(setup, upstream, relay)
            yield Address(port)


def meaning(reply: Reply) -> tuple[int, dict[str, str], Any]:
    """Return the parts of a response that are compared: status, headers, and content."""
    headers = {name: value for name, value in reply.headers.items() if name not in NOT_MEANT}
    kind = headers.get("content-type", "")
    if headers.get("content-encoding") == "gzip" and reply.body.startswith(b"\x1f\x8b"):
        reply = replace(reply, body=gzip.decompress(reply.body))
    if kind == "application/json" and reply.body:
        body = json.loads(reply.body)
        return reply.status, headers, transferred(body) if "events" in body else body
    if kind == CONTENT_TYPE and reply.body:
        return reply.status, headers, b"<figures>"
    if reply.body.startswith(b"event: put\ndata: "):
        return reply.status, headers, json.loads(reply.body.decode().split("data: ", 1)[1])
    return reply.status, headers, reply.body


def transferred(body: dict) -> dict:
    """The items of a complete transfer of FDv2, in the form of `/sdk/latest-all`."""
    names = [each["event"] for each in body["events"]]
    assert (names[0], names[-1]) == ("server-intent", "payload-transferred")
    items: dict = {"flags": {}, "segments": {}}
    for event in body["events"][1:-1]:
        assert event["event"] == "put-object"
        items[f"{event['data']['kind']}s"][event["data"]["key"]] = event["data"]["object"]
    return items


def plain(got: Any, wanted: Any) -> Any:
    """Take out of a status page what only we say, and the times that the recording masks."""
    if wanted == "<ms>" and isinstance(got, int) and got > 0:
        return wanted
    if isinstance(got, dict) and isinstance(wanted, dict):
        kept = {name: plain(v, wanted.get(name)) for name, v in got.items() if name not in OURS}
        assert list(kept) == list(wanted), "the order of members is the reference's"
        return kept
    return got


def without_rollouts(results: dict) -> dict:
    """Flags whose result depends on the bytes of the key; ours are U+FFFD if they are no UTF-8."""
    return {k: v for k, v in results.items() if "rollout" not in json.dumps(WHOLE["flags"][k])}


def difference(r: Recording, reply: Reply) -> str:
    """Say how our answer differs from what is wanted; empty if it does not."""
    wanted, got = meaning(expected(r)), meaning(reply)
    if r.path.endswith("/status"):
        got = (*got[:2], plain(got[2], wanted[2]))
    if wanted[0] == 400 and r.method in ("REPORT", "POST") and "message" in (got[2] or ()):
        got, wanted = (*got[:2], ...), (*wanted[:2], ...)  # the text of a parser is free
    if r.short == "base64: invalid utf-8":
        got, wanted = ((*each[:2], without_rollouts(each[2])) for each in (got, wanted))
    for name in ("expires", "etag"):
        if wanted[1].get(name, "").startswith("<") and name in got[1]:
            got[1][name] = wanted[1][name]
    parts = [f"wanted {w}\n  got    {g}" for w, g in zip(wanted, got, strict=True) if w != g]
    return "\n  ".join([r.name, *parts]) if parts else ""


def difference_of_head(r: Recording, head: Reply, get: Reply) -> str:
    """Say how the answer to HEAD differs from that to GET, but for the body (row 11)."""
    wanted, got = meaning(replace(get, body=b""))[:2], meaning(head)[:2]
    return "" if got == wanted else f"{r.name}\n  wanted {wanted}\n  got    {got}"


async def reply_to(address: Address, r: Recording) -> Reply:
    return await ask(address, r.path, r.headers, method=r.method, body=r.body, chunked=r.chunked)


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
@pytest.mark.parametrize("setup", SETUPS)
async def test_recordings(setup, front):
    """In each state of the relay the answers are the reference's, or better where that is wanted."""
    asked = [r for r in RECORDINGS if r.setup == setup and (front or "#" not in r.path)]
    assert asked
    async with relay_in(setup, front=front) as address:
        replies = [await reply_to(address, r) for r in asked]
        heads = {r: await reply_to(address, replace(r, method="GET")) for r in asked if has_head(r)}
    differences = [
        *(difference(r, reply) for r, reply in zip(asked, replies, strict=True) if r not in heads),
        *(difference_of_head(r, replies[asked.index(r)], get) for r, get in heads.items()),
    ]
    if any(differences):
        pytest.fail("\n".join(filter(None, differences)), pytrace=False)
