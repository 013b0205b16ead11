"""Measurements of a relay that serves client-side SDKs: each function measures one round."""

import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median

from bench import data
from bench.crowd import Crowd
from bench.measures import (
    LOAD_SECONDS,
    WARM_SECONDS,
    Measured,
    as_relay,
    upstream_of,
    whole,
    with_variables,
)
from bench.polls import Load, wrk
from bench.servers import POLL, SDK_KEY, SMALL_SDK_KEY, Certificate, Server, Session
from bench.viewers import Viewers

ENVIRONMENT_ID = "0123456789abcdef01234567"
REPEATED = 200
"""Contexts that ask again and again."""
NEW = 10**9
"""More contexts than can ask within a round: none comes twice."""
IDLE = 10_000
VIEWERS = 5_000
RETURN = f"{VIEWERS} FDv2 client streams come back, one of 1000 flags changed"
RETURN_FULL = f"{VIEWERS} FDv2 client streams, 1000 flags"
RETURN_UNCHANGED = f"{VIEWERS} FDv2 client streams come back, nothing changed"
RETURN_WHOLE = f"{RETURN}: CPU, in that of all flags"
RETURN_ANSWERS = f"{RETURN}: CPU of the answers alone, in that of answers with all flags"
SETTLE_SECONDS = 1.0
CHANGES = 3
"""Changes of one flag in one round; their median is the round's figure."""
WATCHED_SECONDS = 3
"""Time that small polls are watched, once beside evaluations and once after each put."""
PUTS = 3

SCRIPT = """
local number, groups, parts = {first}, {{{groups}}}, {{{parts}}}
local rest_of_head = " HTTP/1.1\\r\\nHost: bench\\r\\n\\r\\n"
function request()
  number = (number + 1) % {contexts}
  local low, rest = number % 1000, math.floor(number / 1000)
  local digits = groups[math.floor(rest / 1000) + 1] .. groups[rest % 1000 + 1] .. groups[low + 1]
  local context = {{}}
  for i, part in ipairs(parts) do context[i] = part[number % #part + 1] end
  return "GET {path}" .. table.concat(context, digits) .. rest_of_head
end
"""
"""For wrk: base64 is put together of that of three digits at a time."""


def evaluate(figure: str, dataset: str, contexts: int, server: Server, _: Certificate) -> Measured:
    """Ask for all flags, for so many contexts in turn."""
    with serve(server, dataset) as session:
        ask(session, dataset, contexts, 0, WARM_SECONDS)
        cpu = session.process.cpu_seconds()
        result = ask(session, dataset, contexts, contexts // 2, LOAD_SECONDS)
        cpu = session.process.cpu_seconds() - cpu
        return {
            figure: result.requests / cpu,
            f"{figure}: wall": result.requests / result.seconds,
            f"{figure}: p99": result.p99_ms,
        }


def idle_pings(server: Server, _: Certificate) -> Measured:
    """Memory of streams that have had their first ping."""
    return {"idle client stream, pings": _idle(server, lambda _: f"/ping/{ENVIRONMENT_ID}") / 1e3}


def idle_evaluating(server: Server, _: Certificate) -> Measured:
    """The same where each has had its flags, evaluated for a context of its own."""
    return {"idle client stream, evaluating": _idle(server, stream_path) / 1e3}


def _idle(server: Server, path: Callable[[int], str]) -> float:
    with serve(server, "eval-1000") as session:
        before = session.process.private_bytes()
        with Crowd(session.port, "", IDLE, path=path) as crowd:
            crowd.connect(timeout=300)
            time.sleep(SETTLE_SECONDS)
            return (session.process.private_bytes() - before) / IDLE


def change(server: Server, _: Certificate) -> Measured:
    """Change one of 1000 flags for clients with contexts of their own, first with pings only."""
    named = {"false": f"{VIEWERS} client streams, pings", "true": f"{VIEWERS} client streams"}
    measured: Measured = {}
    for evaluating, figure in named.items():
        seconds, cpu = _change(server, evaluating)
        measured |= {f"{figure}, one flag changes: last client": seconds}
        measured |= {f"{figure}, one flag changes: CPU": cpu}
    return measured


def _change(server: Server, evaluating: str) -> tuple[float, float]:
    with (
        serve(server, "eval-1000", EVAL_STREAMS=evaluating) as session,
        Viewers(session.port, VIEWERS, stream_path, poll_path) as viewers,
    ):
        viewers.connect()
        times, cpu = [], session.process.cpu_seconds()
        for version in range(2, 2 + CHANGES):
            marker = f"marker-{version}-end-"
            flag = data.rollout_flag(7, version, marker)
            sent = upstream_of(session).change(SDK_KEY, flag)
            times.append(viewers.expect(marker) - sent)
        return median(times), (session.process.cpu_seconds() - cpu) / CHANGES


def come_back(server: Server, _: Certificate) -> Measured:
    """Open FDv2 streams with nothing, change one of 1000 flags, open them again with what they had.

    And once more, with nothing to tell: that is what connections cost.

    Each has a context of its own. A relay without FDv2 for client-side SDKs gets no figures.
    """
    tail = 1024
    with serve(server, "eval-1000") as session:
        client = session.client()
        if client.get(state_poll_path(0)).status != 200:
            return {}
        measured: Measured = {}
        states = [""] * VIEWERS
        for version, figure in ((2, RETURN_FULL), (3, RETURN), (3, RETURN_UNCHANGED)):
            end = b"up-to-date" if figure == RETURN_UNCHANGED else b"payload-transferred"
            marker = f"marker-{version}-end-"
            upstream_of(session).change(SDK_KEY, data.rollout_flag(7, version, marker))
            while marker.encode() not in client.get(state_poll_path(0)).body:
                time.sleep(0.01)
            paths = [fdv2_stream_path(*each) for each in enumerate(states)]
            time.sleep(SETTLE_SECONDS)  # those before are gone
            cpu = session.process.own_cpu_seconds()
            with Crowd(session.port, "", VIEWERS, path=paths.__getitem__) as crowd:
                seconds = crowd.connect(300, end, tail)
                cpu = session.process.own_cpu_seconds() - cpu
                if figure != RETURN_UNCHANGED:
                    states = [_state_in(each) for each in crowd.ends()]
            measured |= {f"{figure}: last client": seconds, f"{figure}: CPU": cpu}
        client.close()
    answers, whole_answers = (
        measured[f"{figure}: CPU"] - measured[f"{RETURN_UNCHANGED}: CPU"]
        for figure in (RETURN, RETURN_FULL)
    )
    return measured | {
        RETURN_WHOLE: measured[f"{RETURN}: CPU"] / measured[f"{RETURN_FULL}: CPU"],
        RETURN_ANSWERS: answers / whole_answers,
    }


def _state_in(end: bytes) -> str:
    found = re.search(rb'"state":"([^"]+)"', end)
    if found is None:
        raise RuntimeError("a transfer ended without a state")
    return found[1].decode()


def worst_poll(server: Server, _: Certificate) -> Measured:
    """Poll one environment while another one's flags are evaluated as fast as it goes."""
    dataset = "eval-1000"
    with serve(server, dataset) as session:
        ask(session, dataset, NEW, 0, WARM_SECONDS)
        seconds = WATCHED_SECONDS * (1 + PUTS) + 1
        load = threading.Thread(target=ask, args=(session, dataset, NEW, NEW // 2, seconds))
        load.start()
        worst = _worst(session)
        after = []
        for version in range(2, 2 + PUTS):
            upstream_of(session).put(SDK_KEY, dataset, version)
            after.append(_worst(session))
        load.join()
        return {
            "worst small poll beside evaluations of 1000 flags": worst * 1e3,
            "worst small poll after a put of 1000 flags beside them": median(after) * 1e3,
        }


def _worst(session: Session) -> float:
    watcher = session.client(SMALL_SDK_KEY)
    until = time.monotonic() + WATCHED_SECONDS
    slowest = 0.0
    while time.monotonic() < until:
        slowest = max(slowest, watcher.get(POLL).seconds)
    watcher.close()
    return slowest


@contextmanager
def serve(server: Server, dataset: str, **variables: str) -> Iterator[Session]:
    """Run a relay with a client-side ID until all flags can be evaluated.

    Its client-side streams evaluate, unless told otherwise or it cannot.
    """
    given = {"LD_CLIENT_SIDE_ID_main": ENVIRONMENT_ID, "EVAL_STREAMS": "true", **variables}
    relay = with_variables(as_relay(server), **given)
    with relay.serve(dataset) as session:
        session.await_status(size=whole(dataset))
        session.await_status(poll_path(0))
        yield session


def stream_path(number: int) -> str:
    """The path of a client-side SDK's stream, for its context."""
    return f"/eval/{ENVIRONMENT_ID}/{data.USUAL_CONTEXTS.in_base64(number)}"


def poll_path(number: int) -> str:
    """The path on which the same SDK polls."""
    return f"/sdk/evalx/{ENVIRONMENT_ID}/contexts/{data.USUAL_CONTEXTS.in_base64(number)}"


def state_poll_path(number: int) -> str:
    """The path on which an SDK polls that speaks FDv2."""
    return f"/sdk/poll/eval/{data.USUAL_CONTEXTS.in_base64(number)}?auth={ENVIRONMENT_ID}"


def fdv2_stream_path(number: int, basis: str) -> str:
    """The path of the stream of such an SDK, which has the data of a state."""
    query = f"?auth={ENVIRONMENT_ID}" + (f"&basis={basis}" if basis else "")
    return f"/sdk/stream/eval/{data.USUAL_CONTEXTS.in_base64(number)}{query}"


def ask(session: Session, dataset: str, contexts: int, first: int, seconds: float) -> Load:
    """Ask for all flags on all connections for a while.

    Raises:
        RuntimeError: There is no wrk; our own clients would be slower than what they measure.
    """
    if not shutil.which("wrk"):
        raise RuntimeError("evaluations are measured with wrk, which is not installed")
    groups = _table(f"{digits:03}" for digits in range(1000))
    parts = ",".join(f"{{{_table(part)}}}" for part in data.CONTEXTS[dataset].parts)
    path = f"/sdk/evalx/{ENVIRONMENT_ID}/contexts/"
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        text = SCRIPT.format(first=first, groups=groups, parts=parts, contexts=contexts, path=path)
        file.write(text)
        file.flush()
        return wrk(session.url(""), seconds, "-s", file.name)


def _table(texts: Iterable[str]) -> str:
    return ",".join(json.dumps(data.base64url(text)) for text in texts)
