"""A relay with workers, as real processes: one upstream connection, and whoever dies is replaced."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from tests.contract.test_deltas import HOSTILE
from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.sdk import Setup, make, sees
from tests.support.serving import SDK_KEY, Address, Stream, ask, until
from tests.support.upstream import ScriptedUpstream

AUTHORIZED = (("Authorization", SDK_KEY),)


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one")))
        yield upstream


class WorkersRelay(RelayProcess):
    """A relay with two workers.

    Args:
        folder: an empty folder.
        upstream: that it follows.
        variables: of the environment.
    """

    def __init__(self, folder: Path, upstream: ScriptedUpstream, **variables: str) -> None:
        super().__init__(
            folder,
            **{
                "LD_ENV_main": SDK_KEY,
                "WORKERS": "2",
                "STREAM_URI": upstream.url,
                "BASE_URI": upstream.url,
                "EVENTS_HOST": upstream.url,
                "USE_EVENTS": "true",
                "EVENTS_FLUSH_INTERVAL": "50ms",
                **variables,
            },
        )

    async def status(self) -> dict:
        reply = await ask(self.address, "/status")
        status: dict = json.loads(reply.body)
        return status

    async def start(self) -> None:
        await super().start()
        await self.until_status(lambda status: status["status"] == "healthy")

    async def until_status(self, holds) -> dict:
        async with asyncio.timeout(15):
            while True:
                status = await self.status()
                if len(status.get("workers", ())) == 2 and holds(status):
                    return status
                await asyncio.sleep(0.02)

    async def is_whole(self) -> bool:
        """Return True if all workers are connected to a feeder with confirmed data."""
        status = await self.status()
        return status["status"] == "healthy" and all_connected(status)

    async def pids(self) -> list[int]:
        status = await self.until_status(all_connected)
        return [worker["pid"] for worker in status["workers"]]

    async def counters(self) -> dict[str, float]:
        """The counters of `/metrics` but those of the process that answers."""
        page = (await ask(self.address, "/metrics", patience=5)).body.decode()
        lines = (line.rpartition(" ") for line in page.splitlines() if line.startswith("relay_"))
        return {name: float(value) for name, _, value in lines if "_total" in name}

    def feeder(self) -> int:
        """Process ID of the last feeder."""
        return int(self.log.rpartition("The feeder is process ")[2].split()[0])


def all_connected(status: dict) -> bool:
    return all(worker["state"] == "VALID" for worker in status["workers"])


async def test_all_workers_share_one_upstream_connection(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay, AsyncExitStack() as stack:
        streams = [await opened(relay, stack) for _ in range(8)]
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        for stream in streams:
            assert b'"two"' in await stream.until(b"\n\n")
        assert upstream.asked("/all") == 1
        status = await relay.until_status(lambda s: s["environments"]["main"]["streams"] == 8)
        assert sum(worker["streams"] for worker in status["workers"]) == 8
        assert all(worker["streams"] for worker in status["workers"])


async def test_states_of_one_worker_are_known_to_the_others(tmp_path, upstream):
    """A client-side SDK that speaks FDv2 may come to any of them with what it has."""
    visible = {"clientSideAvailability": {"usingMobileKey": True}}
    items = [flag(f"filler-{n}", value="x" * 100, **visible) for n in range(8)]
    upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one", **visible), *items))

    async def polled(basis: str = "") -> tuple[str, bytes]:
        """Code of the transfer in a poll on a connection of its own, and the body."""
        path = "/sdk/poll/eval/eyJraW5kIjoidXNlciIsImtleSI6ImEifQ?auth=mob-1"
        reply = await ask(relay.address, path + (f"&basis={basis}" if basis else ""))
        (payload,) = json.loads(reply.body)["events"][0]["data"]["payloads"]
        return payload["intentCode"], reply.body

    async with WorkersRelay(tmp_path, upstream, LD_MOBILE_KEY_main="mob-1") as relay:
        bodies = {(await polled())[1] for _ in range(20)}
        (state,) = {json.loads(body)["events"][-1]["data"]["state"] for body in bodies}
        assert {(await polled(state))[0] for _ in range(20)} == {"none"}
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two", **visible))
        async with asyncio.timeout(10):
            while {(await polled(state))[0] for _ in range(20)} != {"xfer-changes"}:
                pass


async def test_hostile_states_get_everything_from_every_worker(tmp_path, upstream):
    """By each of the four paths; the feeder goes on, and no worker is replaced."""
    visible = {"clientSideAvailability": {"usingMobileKey": True}}
    upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one", **visible)))
    context = "eyJraW5kIjoidXNlciIsImtleSI6ImEifQ"
    async with WorkersRelay(tmp_path, upstream, LD_MOBILE_KEY_main="mob-1") as relay:
        mobile = [("Authorization", "mob-1")]
        for basis in HOSTILE:
            asked = f"?basis={quote(basis, safe='%')}"
            for _ in range(4):  # connections go to either
                for path, headers in (
                    (f"/sdk/poll{asked}", AUTHORIZED),
                    (f"/sdk/stream{asked}", AUTHORIZED),
                    (f"/sdk/poll/eval/{context}{asked}", mobile),
                    (f"/sdk/stream/eval/{context}{asked}", mobile),
                ):
                    reply = await ask(relay.address, path, headers, patience=2)
                    assert reply.status == 200
                    assert b'"intentCode":"xfer-full","reason":"cant-catchup"' in reply.body
                    assert b'"one"' in reply.body
        status = await relay.status()
        assert [worker["restarts"] for worker in status["workers"]] == [0, 0]


async def opened(relay: RelayProcess, stack: AsyncExitStack) -> Stream:
    stream = await Stream.open(relay.address)
    stack.callback(stream.close)
    await stream.until(b"\n\n")
    return stream


async def test_a_worker_that_dies_is_replaced_and_the_streams_of_others_go_on(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay, AsyncExitStack() as stack:
        first, _ = await relay.pids()
        streams = [await opened(relay, stack) for _ in range(8)]
        os.kill(first, signal.SIGKILL)
        await relay.until_status(lambda s: s["workers"][0]["restarts"] == 1 and all_connected(s))
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        ended = 0
        for stream in streams:
            try:
                await stream.until(b"\n\n")
            except (AssertionError, ConnectionError, asyncio.IncompleteReadError):
                ended += 1
        assert 0 < ended < 8
        await relay.said("The worker 0 has ended (killed by signal 9)")
        assert upstream.asked("/all") == 1


async def test_a_client_of_a_worker_that_is_replaced_gets_what_has_changed(tmp_path, upstream):
    """Its basis is known to a process that was not there when it was given."""
    large = {"description": "x" * 5000}
    upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one"), flag("large", 1, "one", **large)))
    async with WorkersRelay(tmp_path, upstream) as relay:
        path = "/sdk/poll"
        first = (await ask(relay.address, path, AUTHORIZED, patience=1)).body
        state = json.loads(first)["events"][-1]["data"]["state"]
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        await relay.until_status(lambda s: s["environments"]["main"]["items"] == 2)
        for pid in await relay.pids():
            os.kill(pid, signal.SIGKILL)
        await relay.until_status(
            lambda s: all_connected(s) and all(w["restarts"] == 1 for w in s["workers"])
        )
        for _ in range(8):
            reply = await ask(relay.address, f"{path}?basis={quote(state)}", AUTHORIZED, patience=1)
            events = json.loads(reply.body)["events"]
            assert [e["data"].get("key") for e in events if e["event"] == "put-object"] == ["lamp"]


async def test_nobody_notices_that_the_feeder_dies(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay, AsyncExitStack() as stack:
        streams = [await opened(relay, stack) for _ in range(4)]
        feeder = relay.feeder()
        os.kill(feeder, signal.SIGKILL)
        polls = 0
        while relay.feeder() == feeder:
            reply = await ask(relay.address, "/sdk/latest-all", AUTHORIZED)
            assert (reply.status, b'"one"' in reply.body) == (200, True)
            polls += 1
        assert polls
        await relay.until_status(lambda s: s["status"] == "healthy")
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        for stream in streams:
            assert b'"two"' in await stream.until(b"\n\n")


async def test_events_are_delivered_once_whatever_dies(tmp_path, upstream):
    spool = {"EVENTS_SPOOL_DIR": str(tmp_path / "spool")}
    (tmp_path / "spool").mkdir()
    async with WorkersRelay(tmp_path, upstream, **spool) as relay:
        accepted = []
        for number in range(60):
            if number in {20, 40}:
                os.kill(relay.feeder(), signal.SIGKILL)
            body = json.dumps([{"kind": "identify", "key": str(number)}]).encode()
            headers = (
                *AUTHORIZED,
                ("X-LaunchDarkly-Event-Schema", "4"),
                ("X-LaunchDarkly-Payload-ID", f"id-{number}"),
                ("Content-Type", "application/json"),
            )
            reply = await ask(relay.address, "/bulk", headers, method="POST", body=body, patience=5)
            if reply.status == 202:
                accepted.append(str(number))
        assert len(accepted) >= 50
        await until(lambda: len(keys_of(upstream)) >= len(accepted), 15)
        assert sorted(keys_of(upstream)) == sorted(accepted)


def keys_of(upstream: ScriptedUpstream) -> list[str]:
    return [event["key"] for post in upstream.accepted for event in post.events if "key" in event]


async def test_all_requests_are_counted(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay:
        for _ in range(20):
            await ask(relay.address, "/sdk/latest-all", AUTHORIZED)
        await relay.until_status(lambda s: s["environments"]["main"]["requests"] == 20)
        first, _ = await relay.pids()
        os.kill(first, signal.SIGKILL)
        await relay.until_status(lambda s: s["workers"][0]["restarts"] == 1)
        page = (await ask(relay.address, "/metrics")).body
        assert b'relay_requests_total{environment="main",platform="server"' in page
        assert (await relay.status())["environments"]["main"]["requests"] == 20


async def test_counts_go_on_when_the_feeder_dies(tmp_path, upstream):
    evaluated = "/sdk/poll/eval/eyJraW5kIjoidXNlciIsImtleSI6ImEifQ?auth=mob-1"
    async with WorkersRelay(tmp_path, upstream, LD_MOBILE_KEY_main="mob-1") as relay:
        for number in range(20):
            path = "/sdk/poll" if number % 2 else "/sdk/latest-all"
            await ask(relay.address, path, AUTHORIZED)
            await upstream.patch(SDK_KEY, flag("lamp", 2 + number, "two"))
        for _ in range(10):
            reply = await ask(relay.address, evaluated)
            state = json.loads(reply.body)["events"][-1]["data"]["state"]
            await ask(relay.address, f"{evaluated}&basis={state}")
        await relay.until_status(lambda s: s["environments"]["main"]["requests"] == 40)
        answers = (await relay.status())["environments"]["main"]["fdv2"]
        assert answers["answers"] == {"full": {"no-state": 10}}
        client_side = answers["clientSide"]["answers"]
        assert client_side["full"]["no-state"] == 10
        assert sum(sum(reasons.values()) for reasons in client_side.values()) == 20
        seen = await relay.counters()
        os.kill(relay.feeder(), signal.SIGKILL)
        while relay.log.count("The feeder is process") < 2 or not await relay.is_whole():
            page = await relay.counters()
            assert {
                name: page.get(name, 0) for name in seen if page.get(name, 0) < seen[name]
            } == {}
            seen |= page


async def test_a_signal_ends_all_processes_in_order(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay, AsyncExitStack() as stack:
        stream = await opened(relay, stack)
        pids = [*await relay.pids(), relay.feeder()]
        assert await relay.stop() == 0
        assert await stream.rest() == b""
        assert not any(is_alive(pid) for pid in pids)


async def test_the_processes_end_with_their_supervisor(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream, DISABLE_INTERNAL_USAGE_METRICS="true") as relay:
        pids = [*await relay.pids(), relay.feeder()]
        await relay.kill()
        await until(lambda: not any(map(is_alive, pids)), 15)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_ping_comes_when_all_workers_have_the_change(tmp_path, upstream):
    """A client that is told to poll may ask another worker, and it asks once."""
    mobile = "mob-5ca1ab1e-0001-4000-8000-00000000b001"
    variables = {"LD_MOBILE_KEY_main": mobile, "EVAL_STREAMS": "false"}
    async with WorkersRelay(tmp_path, upstream, **variables) as relay, AsyncExitStack() as stack:
        pings = [await Stream.open(relay.address, "/mping", key=mobile) for _ in range(4)]
        for stream in pings:
            stack.callback(stream.close)
            await stream.until(b"\n\n")
        first, _ = await relay.pids()
        for stopped in (False, True):
            if stopped:  # then the others do not wait for ever
                os.kill(first, signal.SIGSTOP)
            await upstream.patch(SDK_KEY, flag("lamp", 3 + stopped, f"value-{stopped}"))
            told = [asyncio.create_task(stream.until(b"\n\n")) for stream in pings]
            await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
            if not stopped:
                polls = [ask(relay.address, "/sdk/latest-all", AUTHORIZED) for _ in range(12)]
                assert all(b"value-False" in reply.body for reply in await asyncio.gather(*polls))
                await asyncio.wait(told)
            for task in told:
                task.cancel()
        os.kill(first, signal.SIGCONT)


async def test_a_silent_worker_is_replaced(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay:
        first, _ = await relay.pids()
        os.kill(first, signal.SIGSTOP)
        await relay.said("The worker 0 shows no sign of life and is killed")
        await relay.until_status(lambda s: s["workers"][0]["restarts"] == 1 and all_connected(s))


async def test_another_worker_takes_the_connections_of_one_that_cannot_be_kept_alive(
    tmp_path, upstream
):
    async with WorkersRelay(tmp_path, upstream) as relay:
        for restarts in range(1, 5):
            first, _ = await relay.pids()
            os.kill(first, signal.SIGKILL)
            await relay.said("The worker 0 has ended", restarts)
            delayed = "another one starts in 0.0 s" not in relay.log.splitlines()[-1]
            if delayed:  # it is away now, and nobody of its own accepts on its socket
                replies = [ask(relay.address, "/sdk/latest-all", AUTHORIZED) for _ in range(20)]
                assert {reply.status for reply in await asyncio.gather(*replies)} == {200}
            await relay.until_status(
                lambda s, n=restarts: s["workers"][0]["restarts"] == n and all_connected(s)
            )
        assert delayed
        replies = [ask(relay.address, "/sdk/latest-all", AUTHORIZED) for _ in range(20)]
        assert {reply.status for reply in await asyncio.gather(*replies)} == {200}


async def test_a_webhook_is_acted_upon_once_whoever_gets_it(tmp_path, upstream):
    secret = "a-secret-of-webhooks"
    polling = {"DATA_SOURCE": "polling", "POLL_INTERVAL": "1h", "WEBHOOK_SECRET": secret}
    async with WorkersRelay(tmp_path, upstream, **polling) as relay:
        asked = upstream.asked("/sdk/latest-all")
        content = json.dumps({"_id": "1", "kind": "flag", "accesses": []}).encode()
        signature = hmac.digest(secret.encode(), content, "sha256").hex()
        posts = [
            ask(
                *(relay.address, "/webhooks/launchdarkly", [("X-LD-Signature", signature)]),
                method="POST",
                body=content,
                patience=1,
            )
            for _ in range(12)
        ]
        replies = [(reply.status, reply.body) for reply in await asyncio.gather(*posts)]
        known = [
            body for status, body in replies if (status, b"known already" in body) == (202, True)
        ]
        assert len(known) == 11
        await upstream.until_asked("/sdk/latest-all", asked + 1)


async def test_workers_serve_tls(tmp_path, upstream):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    relay = WorkersRelay(tmp_path, upstream, **tls)
    async with AsyncExitStack() as stack:
        await RelayProcess.start(relay)
        stack.push_async_callback(relay.kill)
        for _ in range(8):
            address = Address(relay.port, trust)
            reply = await ask(address, "/sdk/latest-all", AUTHORIZED, patience=5)
            assert reply.status in {200, 503}
            await relay.said("Upstream is connected")
        assert (reply.status, b'"one"' in reply.body) == (200, True)


async def test_a_configuration_is_reloaded_in_all_workers(tmp_path, upstream):
    upstream.serve("sdk-other", all_data(flag("lamp", 1, "other")))
    file = tmp_path / "relay.conf"
    file.write_text(f'[Environment "main"]\nsdkKey = {SDK_KEY}\n')
    relay = WorkersRelay(tmp_path, upstream)
    relay._arguments = ("--config", str(file), "--from-env")
    relay._variables.pop("LD_ENV_main")
    async with relay:
        file.write_text(file.read_text() + '[Environment "other"]\nsdkKey = sdk-other\n')
        relay.signal(signal.SIGHUP)
        await relay.until_status(
            lambda s: s["environments"].get("other", {}).get("status") == "connected"
        )
        for _ in range(8):
            reply = await ask(relay.address, "/sdk/latest-all", [("Authorization", "sdk-other")])
            assert (reply.status, b'"other"' in reply.body) == (200, True)
        assert relay.log.count("Configuration reloaded") == 1


async def test_a_second_relay_cannot_take_the_port(tmp_path, upstream):
    async with WorkersRelay(tmp_path, upstream) as relay:
        second = WorkersRelay(tmp_path, upstream)
        second.port = relay.port
        second._output = tmp_path / "second.log"
        await second.spawn()
        assert await second.ended() == 1
        assert "Address already in use" in second.log


async def test_a_configuration_that_cannot_be_used_ends_the_relay(tmp_path, upstream):
    relay = WorkersRelay(tmp_path, upstream, FILE_DATA_SOURCE=str(tmp_path / "missing.tar.gz"))
    relay._variables.pop("LD_ENV_main")
    await relay.spawn()
    assert await relay.ended() == 1
    assert relay.log.count("Unable to create relay") == 1


async def test_an_sdk_works(tmp_path, upstream):
    async with (
        WorkersRelay(tmp_path, upstream) as relay,
        make("python", Setup(SDK_KEY, relay.url)) as sdk,
    ):
        await sdk.ready()
        await sees(sdk, "lamp", "one")
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        await sees(sdk, "lamp", "two")
