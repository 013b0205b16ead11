"""A relay in a process of its own reads its configuration again, while clients are at work."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from tests.support.data import all_data, flag
from tests.support.process import PATIENCE, ROOT, RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import Address, Stream, ask
from tests.support.upstream import ScriptedUpstream

A, B, C = (f"sdk-5ca1ab1e-0001-4000-8000-00000000a00{n}" for n in (1, 2, 3))
MOBILE = "mob-5ca1ab1e-0001-4000-8000-00000000b001"
OPEN = {"clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True}}
CONTEXT = "eyJraW5kIjoidXNlciIsImtleSI6ImFubmEifQ"
RELOADED = "Configuration reloaded"
REFUSED = "Configuration not reloaded"


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly with three environments, whose flag has the key of each as its value."""
    async with ScriptedUpstream() as upstream:
        for key in (A, B, C):
            upstream.serve(key, all_data(flag("lamp", value=key, **OPEN)))
        yield upstream


class Configured:
    """A relay with a configuration file.

    Args:
        folder: of the file.
        upstream: to follow.
        variables: of the process.
    """

    def __init__(self, folder: Path, upstream: ScriptedUpstream, **variables: str) -> None:
        self.file = folder / "relay.conf"
        self._upstream = upstream
        folder.mkdir(exist_ok=True)
        arguments = ("--config", str(self.file), "--from-env")
        self.process = RelayProcess(folder, *arguments, **variables)

    def write(self, *environments: str, main: str = "", more: str = "") -> None:
        """Write the file: environments of the form `name: option = value; …`."""
        lines = ["[Main]", f"streamUri = {self._upstream.url}", main, more]
        for each in environments:
            name, _, options = each.partition(": ")
            lines += [f'[Environment "{name}"]', *options.split("; ")]
        self.file.write_text("\n".join(lines))

    async def reload(self, said: str = RELOADED) -> None:
        """Send the signal, and wait until the log tells the outcome."""
        times = self.process.log.count(said)
        self.process.signal(signal.SIGHUP)
        await self.process.said(said, times + 1)

    async def poll(self, key: str) -> int:
        return (await ask(self.process.address, "/sdk/flags", [("Authorization", key)])).status

    async def serves(self, key: str) -> None:
        """Wait until a key is served with its own data."""
        async with asyncio.timeout(PATIENCE):
            while True:
                headers = [("Authorization", key)]
                reply = await ask(self.process.address, "/sdk/flags", headers)
                if reply.status == 200 and key.encode() in reply.body:
                    return
                await asyncio.sleep(0.01)

    async def metric(self, name: str) -> float:
        page = (await ask(self.process.address, "/metrics")).body.decode()
        found = re.search(rf"(?m)^{re.escape(name)} (\S+)$", page)
        assert found, page
        return float(found[1])


@asynccontextmanager
async def configured(
    folder: Path, upstream: ScriptedUpstream, *environments: str, **variables: str
) -> AsyncIterator[Configured]:
    """A relay that serves the first environment."""
    relay = Configured(folder, upstream, **variables)
    relay.write(*environments)
    async with relay.process:
        await relay.process.said("Initialized LaunchDarkly client", len(environments))
        yield relay


async def received(stream: Stream, text: bytes) -> None:
    """Wait until a stream has brought a text in one chunk."""
    async with asyncio.timeout(PATIENCE):
        while text not in await stream.chunk():
            pass


async def test_environments_come_change_and_go(tmp_path, upstream):
    """The new one serves, the streams of the old one end, and the others notice nothing."""
    a, b, c = f"a: sdkKey = {A}", f"b: sdkKey = {B}", f"c: sdkKey = {C}"
    async with configured(tmp_path, upstream, a, b) as relay:
        address = relay.process.address
        kept, gone = await Stream.open(address, key=A), await Stream.open(address, key=B)
        relay.write(f"{a}; ttl = 1m; allowedOrigin = https://shop.example.com", c)
        await relay.reload()
        await relay.serves(C)
        assert await relay.poll(B) == 401
        assert (await gone.rest()).startswith(b"event: put")
        gone.close()
        reply = await ask(address, "/sdk/flags", [("Authorization", A)])
        assert reply.status == 200
        assert "expires" in reply.headers
        await upstream.patch(A, flag("lamp", 2, "patched"))
        await received(kept, b"patched")
        kept.close()
        log = relay.process.log
        assert 'Environment "b" (SDK key ...a002) is removed' in log
        assert 'Environment "a" (SDK key ...a001) has changed: ttl, allowedOrigin' in log
        assert 'Environment "c" (SDK key ...a003) is added' in log
        assert f"{RELOADED}; environments added: 1, changed: 1, removed: 1" in log
        assert not {A, B, C} & set(re.findall(r"sdk-[-0-9a-f]+", log))
        assert await relay.metric('relay_reloads_total{result="success"}') == 1


async def test_a_key_rotates_without_a_gap(tmp_path, upstream):
    """At every moment one of the keys opens the environment, and other credentials stay open."""
    options = f"mobileKey = {MOBILE}"
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}; {options}") as relay:
        address = relay.process.address
        mobile = await Stream.open(address, f"/meval/{CONTEXT}", key=MOBILE)
        old = await Stream.open(address, key=A)
        statuses = []

        async def poll() -> None:
            while True:
                before = await relay.poll(A)
                statuses.append((before, await relay.poll(B) if before != 200 else before))
                path = f"/msdk/evalx/contexts/{CONTEXT}"
                reply = await ask(address, path, [("Authorization", MOBILE)])
                statuses.append((0, reply.status))

        polling = asyncio.create_task(poll())
        relay.write(f"a: sdkKey = {B}; {options}")
        await relay.reload()
        await relay.process.said("The new SDK key is used upstream")
        await upstream.left(A)
        await old.rest()
        old.close()
        await relay.serves(B)
        polling.cancel()
        assert {status for _, status in statuses} == {200}
        assert (401, 200) in statuses or await relay.poll(A) == 401
        await upstream.put(B, all_data(flag("lamp", 9, "newest", **OPEN)))
        await received(mobile, b"newest")
        mobile.close()
        assert "sdkKey ...a002" in relay.process.log


async def test_a_refused_key_leaves_the_data(tmp_path, upstream):
    """With a key that LaunchDarkly does not know, the data go on being served and updated."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        relay.write("a: sdkKey = sdk-unknown-0000")
        await relay.reload()
        await relay.process.said("The former SDK key is still used upstream")
        assert await relay.poll("sdk-unknown-0000") == 200
        relay.write(f"a: sdkKey = {B}")
        await relay.reload()
        await relay.serves(B)


async def test_a_credential_that_moves_is_never_refused(tmp_path, upstream):
    """A mobile key goes from one environment to another, and back, and to no one else."""
    async with configured(
        tmp_path, upstream, f"a: sdkKey = {A}; mobileKey = {MOBILE}", f"b: sdkKey = {B}"
    ) as relay:
        statuses = set()

        async def poll() -> None:
            path = f"/msdk/evalx/contexts/{CONTEXT}"
            while True:
                reply = await ask(relay.process.address, path, [("Authorization", MOBILE)])
                statuses.add(reply.status)

        polling = asyncio.create_task(poll())
        for _ in range(3):
            relay.write(f"a: sdkKey = {A}", f"b: sdkKey = {B}; mobileKey = {MOBILE}")
            await relay.reload()
            relay.write(f"a: sdkKey = {A}; mobileKey = {MOBILE}", f"b: sdkKey = {B}")
            await relay.reload()
        polling.cancel()
        assert statuses == {200}


async def test_a_credential_that_two_had_is_given_back(tmp_path, upstream):
    """As after a restart: of two environments the later one has it; when that goes, the first."""
    first = f"a: sdkKey = {A}; mobileKey = {MOBILE}"
    path, headers = f"/msdk/evalx/contexts/{CONTEXT}", [("Authorization", MOBILE)]
    async with configured(
        tmp_path, upstream, first, f"b: sdkKey = {B}; mobileKey = {MOBILE}"
    ) as relay:
        address = relay.process.address
        assert B.encode() in (await ask(address, path, headers)).body
        relay.write(f"{first}; ttl = 1m", f"b: sdkKey = {B}; mobileKey = {MOBILE}")
        await relay.reload()
        assert B.encode() in (await ask(address, path, headers)).body
        relay.write(first, f"b: sdkKey = {B}")
        await relay.reload()
        assert A.encode() in (await ask(address, path, headers)).body


async def test_a_new_name_is_no_new_environment(tmp_path, upstream):
    """Streams stay open, because the SDK key is the same."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        stream = await Stream.open(relay.process.address, key=A)
        relay.write(f"renamed: sdkKey = {A}")
        await relay.reload()
        await upstream.patch(A, flag("lamp", 2, "patched"))
        await received(stream, b"patched")
        stream.close()
        assert await relay.metric('relay_changes_total{environment="renamed"}') == 2


async def test_filters_come_and_go(tmp_path, upstream):
    """A variant for each key of the list, and none for others."""
    upstream.serve(f"{A}?filter=part", all_data(flag("part")))
    options = f"a: sdkKey = {A}; projKey = shop"
    async with configured(tmp_path, upstream, options) as relay:
        relay.write(options, more='[Filters "shop"]\nkeys = part')
        await relay.reload()
        await relay.process.said('Initialized LaunchDarkly client for "a/part"')
        path, headers = "/sdk/flags?filter=part", [("Authorization", A)]
        assert (await ask(relay.process.address, path, headers)).status == 200
        relay.write(options)
        await relay.reload()
        assert (await ask(relay.process.address, path, headers)).status in (401, 404)
        assert await relay.poll(A) == 200


async def test_a_faulty_configuration_changes_nothing(tmp_path, upstream):
    """All that is wrong is in the log, each with its line, and what is right waits, too."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        stream = await Stream.open(relay.process.address, key=A)
        relay.write("a: ttl = 1", f"b: sdkKey = {B}; oops = 1", main="port = x")
        await relay.reload(REFUSED)
        await relay.process.said("nothing has changed; problems: 4")
        for problem in (
            "3: port: not a valid integer",
            "6: ttl: not a valid duration",
            '9: unsupported or misspelled section "Environment", subsection "b", variable "oops"',
            'SDK key is required for environment "a"',
        ):
            await relay.process.said(problem)
        assert [await relay.poll(key) for key in (A, B)] == [200, 401]
        await upstream.patch(A, flag("lamp", 2, "patched"))
        await received(stream, b"patched")
        stream.close()
        assert await relay.metric('relay_reloads_total{result="failure"}') == 1
        relay.file.unlink()
        await relay.reload(REFUSED)
        await relay.process.said(f'configuration file "{relay.file}" does not exist')
        relay.write(f"a: sdkKey = {A}")
        await relay.reload()
        assert await relay.metric('relay_reloads_total{result="success"}') == 1


async def test_what_needs_a_restart_is_named_and_left(tmp_path, upstream):
    """In one warning; the rest of the same file is in force."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        relay.write(f"b: sdkKey = {B}", f"a: sdkKey = {A}", main="heartbeatInterval = 1s")
        await relay.reload()
        text = (
            f"Not changed before the relay is restarted: [Main] heartbeatInterval ({relay.file}:3)"
        )
        assert relay.process.log.count(text) == 1
        await relay.serves(B)


async def test_nothing_new_is_said(tmp_path, upstream):
    """A reload that finds nothing says so, and disturbs nobody."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        await relay.reload()
        assert f"{RELOADED}; environments added: 0, changed: 0, removed: 0" in relay.process.log
        assert len(upstream.requests) == 1


async def test_many_hangups_are_few_reloads(tmp_path, upstream):
    """Those that come during a reload lead to one more; the last file counts."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        for _ in range(200):
            relay.process.signal(signal.SIGHUP)
        relay.write(f"a: sdkKey = {A}", f"b: sdkKey = {B}")
        relay.process.signal(signal.SIGHUP)
        await relay.process.said('Environment "b"')
        await relay.serves(B)
        assert 1 <= relay.process.log.count(RELOADED) <= 100
        assert REFUSED not in relay.process.log


async def test_secrets_in_files_are_read_again(tmp_path, upstream):
    """Those of variables and those of options, with a file that did not change itself."""
    secrets = {name: tmp_path / name for name in ("a", "b", "webhook")}
    for name, key in (("a", A), ("b", B), ("webhook", "first-secret")):
        secrets[name].write_text(f"{key}\n")
    relay = Configured(
        tmp_path,
        upstream,
        LD_ENV_a_FILE=str(secrets["a"]),
        WEBHOOK_SECRET_FILE=str(secrets["webhook"]),
    )
    relay.write(f"b: sdkKeyFile = {secrets['b']}")
    async with relay.process:
        await relay.process.said("Initialized LaunchDarkly client", 2)
        secrets["b"].write_text(C)
        await relay.reload()
        await relay.serves(C)
        secrets["a"].write_text(B)
        secrets["webhook"].write_text("second-secret")
        await relay.reload()
        await relay.serves(B)
        assert [await relay.poll(key) for key in (A, B, C)] == [401, 200, 200]
        assert await _webhook(relay, "first-secret") == 401
        assert await _webhook(relay, "second-secret") == 202
        secrets["a"].write_text("")
        await relay.reload(REFUSED)
        await relay.process.said("LD_ENV_a_FILE")
        assert await relay.poll(B) == 200
        assert "second-secret" not in relay.process.log


async def _webhook(relay: Configured, secret: str) -> int:
    content = b'{"_id":"%d","kind":"flag"}' % len(secret)
    signature = hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
    headers = [("X-LD-Signature", signature)]
    path = "/webhooks/launchdarkly"
    address = relay.process.address
    return (await ask(address, path, headers, method="POST", body=content)).status


async def test_documents_change_in_place(tmp_path, upstream):
    """They are published where the configuration says now, under the name that it says."""
    here, there = tmp_path / "here", tmp_path / "there"
    one, two = f"a: sdkKey = {A}; envId = id-a", f"a: sdkKey = {A}; envId = id-b"
    async with configured(tmp_path, upstream, one) as relay:
        stream = await Stream.open(relay.process.address, key=A)
        relay.write(one, more=f"[Publish]\nto = file://{here}")
        await relay.reload()
        await relay.process.until(lambda: any(here.glob("*id-a*")))
        relay.write(one, more=f"[Publish]\nto = file://{there}")
        await relay.reload()
        await relay.process.until(lambda: any(there.glob("*id-a*")))
        relay.write(two, more=f"[Publish]\nto = file://{there}")
        await relay.reload()
        await relay.process.until(lambda: any(there.glob("*id-b*")))
        relay.write(f"a: sdkKey = {A}")
        await relay.reload()
        assert "need" not in relay.process.log
        await upstream.patch(A, flag("lamp", 2, "two"))
        await received(stream, b'"two"')
        stream.close()


@pytest.mark.parametrize("way", ["signal", "watch"])
async def test_a_certificate_is_renewed(tmp_path, upstream, way):
    """New connections get it, the others stay; half of one is refused."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    trusts = []

    def renew(*parts: str) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        trusts.append(ssl.create_default_context())
        authority.configure_trust(trusts[-1])
        blobs = {"cert": issued.cert_chain_pems[0], "key": issued.private_key_pem}
        for part in parts:
            blobs[part].write_to_path({"cert": cert, "key": key}[part])

    renew("cert", "key")
    tls = {"TLS_ENABLED": "1", "TLS_CERT": str(cert), "TLS_KEY": str(key), "RELOAD": way}
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}", **tls) as relay:
        process = relay.process
        old = Address(process.port, trusts[0])
        stream = await Stream.open(old, key=A)
        renew("cert")
        if way == "signal":
            process.signal(signal.SIGHUP)
        await process.said(REFUSED)
        assert f"TLS certificate {cert} with key {key} cannot be used" in process.log
        assert (await ask(old, "/readyz")).status == 200
        renew("cert", "key")
        if way == "signal":
            process.signal(signal.SIGHUP)
        await process.said("The certificate of the server is another one")
        assert (await ask(Address(process.port, trusts[-1]), "/readyz")).status == 200
        with pytest.raises(ssl.SSLError):
            await old.connect()
        await upstream.patch(A, flag("lamp", 2, "two"))
        await received(stream, b'"two"')
        stream.close()


async def test_a_file_that_vanishes_changes_nothing(tmp_path, upstream):
    """Even if it might have been missing at the start: more likely it is being replaced."""
    file = tmp_path / "relay.conf"
    arguments = ("--config", str(file), "--allow-missing-file", "--from-env")
    variables = {"LD_ENV_a": A, "STREAM_URI": upstream.url, "RELOAD": "watch"}
    async with RelayProcess(tmp_path, *arguments, **variables) as relay:
        await relay.said("Initialized")
        file.write_text(f'[Environment "c"]\nsdkKey = {C}\n')
        await relay.said('Initialized LaunchDarkly client for "c"')
        file.unlink()
        await relay.said(f'configuration file "{file}" does not exist any more')
        reply = await ask(relay.address, "/sdk/flags", [("Authorization", C)])
        assert reply.status == 200


async def test_levels_of_the_log_change(tmp_path, upstream):
    """That of the relay and that of an environment; each request is logged at debug."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        await relay.poll(A)
        await relay.poll(A)
        assert "Request:" not in relay.process.log
        relay.write(f"a: sdkKey = {A}", main="logLevel = debug")
        await relay.reload()
        await relay.poll(A)
        await relay.process.said("url=/sdk/flags auth=*0a001")
        await ask(relay.process.address, f"/sdk/evalx/contexts/{CONTEXT}", [("Authorization", A)])
        await relay.process.said("Request:", 2)
        relay.write(f"a: sdkKey = {A}; logLevel = error", main="logLevel = info")
        await relay.reload()
        before = relay.process.log
        await relay.poll(A)
        upstream.close_streams(A)
        await upstream.connected(A, 2)
        relay.write(f"a: sdkKey = {A}", main="logLevel = info")
        await relay.reload()
        since = relay.process.log.removeprefix(before)
        assert "Request:" not in since
        assert "[env:" not in since


async def test_a_directory_of_a_kubernetes_volume_is_watched(tmp_path, upstream):
    """A ConfigMap changes by a link that is swapped; nobody sends a signal."""
    volume = tmp_path / "volume"
    relay = Configured(volume, upstream)
    _publish(volume, 1, f'[Environment "a"]\nsdkKey = {A}\n', upstream)
    async with relay.process:
        await relay.serves(A)
        _publish(volume, 2, f'[Environment "b"]\nsdkKey = {B}\n', upstream)
        await relay.serves(B)
        _publish(volume, 3, '[Environment "c"]\noops\n', upstream)
        await relay.process.said(REFUSED)
        _publish(volume, 4, f'[Environment "c"]\nsdkKey = {C}\n', upstream)
        await relay.serves(C)
        await relay.process.said(RELOADED, 2)
        assert relay.process.log.count(REFUSED) == 1
        assert relay.process.log.count(RELOADED) == 2


def _publish(volume: Path, number: int, text: str, upstream: ScriptedUpstream) -> None:
    """Put a file into a volume, as Kubernetes does."""
    folder = volume / f"..2026_{number}"
    folder.mkdir(parents=True, exist_ok=True)
    main = f"[Main]\nreload = watch\nstreamUri = {upstream.url}\n"
    (folder / "relay.conf").write_text(main + text)
    link = volume / "..data_tmp"
    link.symlink_to(folder.name)
    link.replace(volume / "..data")
    if not (volume / "relay.conf").is_symlink():
        (volume / "relay.conf").symlink_to("..data/relay.conf")


async def test_stored_data_follow_a_key_and_a_prefix(tmp_path, upstream):
    """A new key has a snapshot of its own, a new prefix the data; the database stays connected."""
    folder = tmp_path / "redis"
    folder.mkdir()
    snapshots = tmp_path / "snapshots"
    upstream.serve(B, all_data(flag("lamp", 2, B)))
    with RedisServer(folder) as redis:
        variables = {"USE_REDIS": "1", "REDIS_URL": redis.url, "SNAPSHOT_DIR": str(snapshots)}
        async with configured(
            tmp_path, upstream, f"a: sdkKey = {A}; prefix = one", **variables
        ) as relay:
            await relay.process.until(lambda: redis.do("EXISTS", "one:$inited") == 1)
            relay.write(f"a: sdkKey = {B}; prefix = one")
            await relay.reload()
            await relay.serves(B)
            assert relay.process.log.count("Using Redis data store") == 1
            await relay.process.until(lambda: B.encode() in redis.hash("one:features")["lamp"])
            relay.write(f"a: sdkKey = {B}; prefix = two")
            await relay.reload()
            await relay.process.until(lambda: redis.do("EXISTS", "two:$inited") == 1)
            assert redis.do("EXISTS", "one:$inited") == 1
            await upstream.put(B, all_data(flag("lamp", 5, "latest")))
            await relay.process.until(lambda: b"latest" in redis.hash("two:features")["lamp"])
            assert b"latest" not in redis.hash("one:features")["lamp"]
            await relay.process.stop()
    upstream.always(B, _never)
    async with RelayProcess(
        tmp_path, STREAM_URI=upstream.url, SNAPSHOT_DIR=str(snapshots), LD_ENV_a=B
    ) as again:
        await again.said("Serving stored data")
        reply = await ask(again.address, "/sdk/flags", [("Authorization", B)])
        assert b"latest" in reply.body


async def test_the_database_may_be_another_one(tmp_path, upstream):
    """Streams notice nothing of another password or server, but of the first and of none at all."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    password = tmp_path / "password"
    password.write_text("first")
    with RedisServer(folders[0]) as one, RedisServer(folders[1]) as two:
        one.do("ACL", "SETUSER", "relay", "on", ">first", "~*", "+@all")
        locked = f"[Redis]\nurl = {one.url}\nusername = relay\npasswordFile = {password}"
        async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
            relay.write(f"a: sdkKey = {A}", more=locked)
            await relay.reload()
            await relay.process.until(lambda: stored(one) == A)
            stream = await Stream.open(relay.process.address, key=A)
            one.do("ACL", "SETUSER", "relay", "resetpass", ">second")
            one.do("CLIENT", "KILL", "USER", "relay")
            password.write_text("second")
            await relay.reload()
            await upstream.patch(A, flag("lamp", 2, "patched"))
            await relay.process.until(lambda: stored(one) == "patched")
            relay.write(f"a: sdkKey = {A}", more=f"[Redis]\nurl = {two.url}")
            await relay.reload()
            await relay.process.until(lambda: stored(two) == "patched")
            relay.write(f"a: sdkKey = {A}", more="[Redis]\nurl = ftp://nowhere")
            await relay.reload(REFUSED)
            await upstream.patch(A, flag("lamp", 3, "newest"))
            await received(stream, b"newest")
            await relay.process.until(lambda: stored(two) == "newest")
            assert stored(one) == "patched"
            relay.write(f"a: sdkKey = {A}")
            await relay.reload()
            await stream.rest()
            stream.close()
            await relay.serves(A)
            assert relay.process.log.count("has changed: where it is stored") == 2
            assert not re.search("first|second", relay.process.log)


def stored(redis: RedisServer) -> str:
    """Return the value of the flag in a database; empty without one."""
    item = redis.hash("launchdarkly:features").get("lamp")
    return json.loads(item)["variations"][0] if item else ""


async def _never(_: object):
    await asyncio.Event().wait()


async def test_with_automatic_configuration_its_options_are_named(tmp_path, upstream):
    """Its environments come from LaunchDarkly; levels of the log change all the same."""
    file = tmp_path / "relay.conf"

    def write(key: str, level: str) -> None:
        file.write_text(
            f"[Main]\nstreamUri = {upstream.url}\nlogLevel = {level}\n[AutoConfig]\nkey = {key}\n"
        )

    write("rel-first", "info")
    upstream.always("rel-first", _never)
    async with RelayProcess(tmp_path, "--config", str(file), "--from-env") as process:
        await process.said("Connecting to auto-configuration stream")
        write("rel-second", "debug")
        process.signal(signal.SIGHUP)
        await process.said(f"restarted: [AutoConfig] key ({file}:5)")
        await process.said(RELOADED)
        await ask(process.address, "/livez")
        await process.said("Request: method=GET url=/livez")
        assert "rel-second" not in process.log


async def test_the_command_finds_the_relay(tmp_path, upstream):
    """By its announcement and port, or by its process; the log of the relay tells the outcome."""
    async with configured(tmp_path, upstream, f"a: sdkKey = {A}") as relay:
        relay.write(f"b: sdkKey = {B}")
        assert _command(PORT=str(relay.process.port)).returncode == 0
        await relay.process.said(RELOADED)
        await relay.serves(B)
        done = _command("--pid", str(relay.process.pid))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"process {relay.process.pid} reloads" in done.stdout
        await relay.process.said(RELOADED, 2)


def _command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "reload", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
