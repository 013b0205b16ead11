"""The updater: event shapes as AWS documents them, and a run under Lambda's own runtime client."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from aiohttp import web

from relay.aws import updater
from relay.model.credential import Secret
from relay.protocol.webhook import MAX_BODY, sign
from tests.support.data import all_data, flag, segment
from tests.support.dynamodb import VARIABLES, DynamoDBServer
from tests.support.process import PATIENCE, ROOT
from tests.support.redis import RedisServer
from tests.support.rediscluster import Cluster, wait_until
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream, ThreadedUpstream, in_thread

SECRET = "a-long-random-text"
LONGEST_IMPORT = 0.3
"""Seconds that a cold import may take, beside the interpreter's own start."""
BODY = json.dumps(
    {"_id": "1", "kind": "flag", "accesses": [{"resource": "proj/shop:env/production:flag/lamp"}]}
).encode()


def announcing(version: int, identity: str) -> bytes:
    entry = json.loads(BODY) | {"_id": identity}
    environments = {"production": {"version": version}}
    return json.dumps(
        entry | {"currentVersion": {"key": "lamp", "environments": environments}}
    ).encode()


def rest(body: bytes | None, signature: str | None, *, encoded: bool = False) -> dict:
    """API Gateway, payload format 1.0: headers as they were sent."""
    headers = {"Content-Type": "application/json", "Host": "id.execute-api.eu-west-1.amazonaws.com"}
    if signature is not None:
        headers["X-Ld-Signature"] = signature
    return {
        "version": "1.0",
        "resource": "/hook",
        "path": "/hook",
        "httpMethod": "POST",
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": None,
        "requestContext": {"httpMethod": "POST", "stage": "$default", "protocol": "HTTP/1.1"},
        "pathParameters": None,
        "stageVariables": None,
        **content(body, encoded=encoded),
    }


def multi_value(body: bytes | None, signature: str | None, *, encoded: bool = False) -> dict:
    """Format 1.0 of a load balancer that gives lists only."""
    return rest(body, signature, encoded=encoded) | {"headers": None}


def http(body: bytes | None, signature: str | None, *, encoded: bool = False) -> dict:
    """API Gateway, payload format 2.0, and function URLs: names of headers in lower case."""
    headers = {"content-type": "application/json", "host": "id.lambda-url.eu-west-1.on.aws"}
    if signature is not None:
        headers["x-ld-signature"] = signature
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": "/hook",
        "rawQueryString": "",
        "headers": headers,
        "requestContext": {
            "accountId": "anonymous",
            "http": {"method": "POST", "path": "/hook", "protocol": "HTTP/1.1"},
            "stage": "$default",
        },
        **content(body, encoded=encoded),
    }


def content(body: bytes | None, *, encoded: bool) -> dict:
    if body is None:
        return {"body": None, "isBase64Encoded": False}
    text = base64.b64encode(body).decode() if encoded else body.decode()
    return {"body": text, "isBase64Encoded": encoded}


SHAPES = (rest, multi_value, http)


@pytest.fixture
def upstream() -> Iterator[ThreadedUpstream]:
    with in_thread() as upstream:
        upstream.do("serve", SDK_KEY, all_data(flag(value="one")))
        yield upstream


def variables(upstream_url: str, redis: RedisServer) -> dict[str, str]:
    return {
        "LD_ENV_main": SDK_KEY,
        "LD_PROJ_KEY_main": "shop",
        "LD_ENV_KEY_main": "production",
        "DATA_SOURCE": "polling",
        "BASE_URI": upstream_url,
        "STREAM_URI": upstream_url,
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        "WEBHOOK_SECRET": SECRET,
    }


@pytest.fixture
def call(monkeypatch, upstream, redis):
    """Calls the handler as Lambda does, of an instance that has just been made."""
    for name in [name for name in os.environ if name.startswith("LD_")]:
        monkeypatch.delenv(name)
    for name, value in variables(upstream.url, redis).items():
        monkeypatch.setenv(name, value)
    updater._done.clear()

    def call(event: object, seconds: float = 30) -> tuple[int, dict]:
        left = SimpleNamespace(get_remaining_time_in_millis=lambda: int(seconds * 1000))
        answer = updater.handler(event, left)
        assert answer["headers"] == {"content-type": "application/json"}
        json.dumps(answer)
        return answer["statusCode"], json.loads(answer["body"])

    return call


def stored(redis: RedisServer) -> str:
    lamp = redis.hash("launchdarkly:features").get("lamp")
    return json.loads(lamp)["variations"][0] if lamp else ""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoded", [False, True])
def test_a_signed_request_brings_the_database_up_to_date(call, redis, shape, encoded):
    """Whatever its shape; the answer says what was done."""
    status, said = call(shape(BODY, sign(BODY, Secret(SECRET)), encoded=encoded))
    assert status == 200
    counts = {"added": 1, "updated": 0, "deleted": 0, "kept": 0, "items": 1}
    assert said == {"message": "up to date", "environments": {"main": counts}}
    assert stored(redis) == "one"


def test_documents_are_published_without_any_database(call, upstream, s3_server, monkeypatch):
    """A webhook, a function and a bucket are all there is; each call has connections of its own."""
    bucket = s3_server.new_bucket()
    monkeypatch.delenv("USE_REDIS")
    monkeypatch.delenv("REDIS_URL")
    published = {"PUBLISH_TO": bucket.url, "LD_CLIENT_SIDE_ID_main": "id", **s3_server.variables}
    for name, value in published.items():
        monkeypatch.setenv(name, value)
    for version in (1, 2):
        upstream.do("serve", SDK_KEY, all_data(flag(version=version)))
        body = announcing(version, f"change-{version}")
        status, _ = call(http(body, sign(body, Secret(SECRET))))
        assert status == 200
        assert json.loads(bucket.get("LD-Env-id"))["flags"]["lamp"]["version"] == version


def test_a_table_of_dynamodb_is_brought_up_to_date(call, upstream, monkeypatch):
    """First all, then the difference; each call has connections of its own."""
    monkeypatch.delenv("USE_REDIS")
    monkeypatch.delenv("REDIS_URL")
    with DynamoDBServer() as server:
        table = server.new_table()
        of_the_function = VARIABLES | {"AWS_SESSION_TOKEN": "of-the-role"}
        settings = {"USE_DYNAMODB": "1", "DYNAMODB_URL": server.url, "DYNAMODB_TABLE": table.name}
        for name, value in (of_the_function | settings).items():
            monkeypatch.setenv(name, value)
        upstream.do("serve", SDK_KEY, all_data(flag(), flag("other"), segment()))
        counts = {"added": 3, "updated": 0, "deleted": 0, "kept": 0, "items": 3}
        for version in (1, 2):
            body = announcing(version, f"table-{version}")
            status, said = call(http(body, sign(body, Secret(SECRET))))
            assert (status, said["environments"]["main"]) == (200, counts)
            assert table.get("features", "lamp")["version"]["N"] == str(version)
            assert table.get("$inited", "$inited")
            upstream.do("serve", SDK_KEY, all_data(flag(version=2), flag("other"), segment()))
            counts |= {"added": 0, "updated": 1}
        table.drop()
        status, said = call(http(BODY, sign(BODY, Secret(SECRET))), seconds=4)
        assert status == 502
        assert "problem" in said["environments"]["main"]


@pytest.mark.parametrize("prefix", ["shop", "{shop}"])
def test_a_cluster_is_brought_up_to_date(call, upstream, cluster, monkeypatch, prefix):
    """With any prefix: first all, then the difference, then what a master has lost."""
    settings = {"REDIS_URL": cluster.url, "REDIS_CLUSTER": "true", "LD_PREFIX_main": prefix}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    upstream.do("serve", SDK_KEY, all_data(flag(), flag("other"), segment()))
    counts = {"added": 3, "updated": 0, "deleted": 0, "kept": 0, "items": 3}

    def bring_up_to_date(version: int) -> tuple[int, dict]:
        body = announcing(version, f"cluster-{prefix}-{version}")
        return call(http(body, sign(body, Secret(SECRET))))

    for version in (1, 2):
        status, said = bring_up_to_date(version)
        assert (status, said["environments"]["main"]) == (200, counts)
        flags = cluster.hash(f"{prefix}:features")
        assert json.loads(flags["lamp"])["version"] == version
        assert cluster.do("EXISTS", f"{prefix}:$inited")
        upstream.do("serve", SDK_KEY, all_data(flag(version=2), flag("other"), segment()))
        counts |= {"added": 0, "updated": 1}
    cluster.do("DEL", f"{prefix}:segments")
    upstream.do("serve", SDK_KEY, all_data(flag(version=3), flag("other"), segment()))
    status, said = bring_up_to_date(3)
    assert (status, said["environments"]["main"]) == (200, counts | {"added": 1})
    assert cluster.hash(f"{prefix}:segments").keys() == {"crowd"}


def test_a_cluster_that_lacks_a_master_is_a_failure(call, upstream, tmp_path, monkeypatch):
    """LaunchDarkly calls again, and then it is brought up to date."""
    with Cluster(tmp_path) as cluster:
        monkeypatch.setenv("REDIS_URL", cluster.url)
        monkeypatch.setenv("REDIS_CLUSTER", "true")
        master = cluster.master_of("launchdarkly:features")
        master.kill()
        body = announcing(1, "a-master-is-away")
        status, said = call(http(body, sign(body, Secret(SECRET))), seconds=4)
        assert status == 502
        assert "problem" in said["environments"]["main"]
        master.start()
        wait_until(
            lambda: all(s.do("CLUSTER INFO")["cluster_state"] == "ok" for s in cluster.servers)
        )
        status, _ = call(http(body, sign(body, Secret(SECRET))))
        assert status == 200
        assert cluster.hash("launchdarkly:features").keys() == {"lamp"}


def test_one_destination_that_fails_is_a_failure(call, redis, monkeypatch):
    """The others are brought up to date all the same, and LaunchDarkly calls again."""
    monkeypatch.setenv("LD_CLIENT_SIDE_ID_main", "id")
    monkeypatch.setenv("PUBLISH_TO", "file:///proc/nowhere")
    status, said = call(http(BODY, sign(BODY, Secret(SECRET))), seconds=4)
    assert status == 502
    assert "problem" in said["environments"]["main"]
    assert stored(redis) == "one"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "refused",
    [
        (BODY, None, 401),
        (BODY, "", 401),
        (BODY, "0" * 64, 401),
        (BODY, sign(BODY, Secret("another")), 401),
        (None, None, 401),
        (b"[]", sign(b"[]", Secret(SECRET)), 400),
        (b"x" * (MAX_BODY + 1), sign(b"x", Secret(SECRET)), 413),
    ],
)
def test_what_is_refused_causes_no_work(call, redis, upstream, shape, refused):
    """Neither upstream nor the database hear of it."""
    body, signature, expected = refused
    status, _ = call(shape(body, signature))
    assert status == expected
    assert not upstream.upstream.requests
    assert redis.do("DBSIZE") == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_body_that_is_not_base64_is_malformed(call, shape):
    """Though the event says so."""
    event = shape(BODY, sign(BODY, Secret(SECRET)))
    assert call(event | {"isBase64Encoded": True})[0] == 400


def test_only_posts_are_webhooks(call):
    """Browsers that find the address are told."""
    event = http(None, None)
    event["requestContext"]["http"]["method"] = "GET"
    assert call(event)[0] == 405
    assert call(rest(None, None) | {"httpMethod": "GET"})[0] == 405


@pytest.mark.parametrize("event", [{}, None, [], {"source": "aws.events"}, json.loads(BODY)])
def test_an_invocation_without_signature_must_be_allowed(call, monkeypatch, redis, event):
    """Then it brings all environments up to date."""
    assert call(event)[0] == 403
    assert redis.do("DBSIZE") == 0
    monkeypatch.setenv(updater.ALLOW_INVOKE, "true")
    assert call(event)[0] == 200
    assert stored(redis) == "one"
    unsigned = http(BODY, None)
    assert call(unsigned)[0] == 401


def test_what_is_not_yet_there_is_asked_for_again(call, redis, upstream):
    """LaunchDarkly's caches may lag behind the webhook."""
    new = all_data(flag(value="two", version=2))
    loop = upstream._loop
    loop.call_soon_threadsafe(loop.call_later, 1, upstream.upstream.serve, SDK_KEY, new)
    body = announcing(2, "2")
    assert call(http(body, sign(body, Secret(SECRET))))[0] == 200
    assert stored(redis) == "two"
    assert len(upstream.upstream.requests) == 2


def test_a_function_that_has_little_time_does_not_wait(call, redis, upstream):
    """Data that it could get are stored, and it answers before it is ended."""
    body = announcing(9, "3")
    assert call(http(body, sign(body, Secret(SECRET))), seconds=5)[0] == 200
    assert stored(redis) == "one"
    assert len(upstream.upstream.requests) == 1


def test_a_replay_is_known_once_its_work_is_done(call, redis, upstream):
    """The retry that follows a failure is not a replay."""
    event = http(BODY, sign(BODY, Secret(SECRET)))
    upstream.do("always", SDK_KEY, _refuse)
    status, said = call(event)
    assert status == 502
    assert said["environments"] == {
        "main": {"problem": "not up to date; the function's log tells why"}
    }
    upstream.do("always", SDK_KEY, None)
    assert call(event)[0] == 200
    before = len(upstream.upstream.requests)
    assert call(event) == (200, {"message": "known already"})
    assert len(upstream.upstream.requests) == before


async def _refuse(_: web.Request) -> web.Response:
    return web.Response(status=401)


@pytest.mark.parametrize("missing", ["WEBHOOK_SECRET", "LD_ENV_main", "USE_REDIS"])
def test_a_configuration_that_cannot_work_is_said_in_the_log_only(
    call, monkeypatch, caplog, missing
):
    """Whoever sends requests learns nothing of it."""
    monkeypatch.delenv(missing)
    if missing == "LD_ENV_main":
        monkeypatch.delenv("LD_ENV_KEY_main")  # which alone would be the SDK key of "KEY_main"
    status, said = call(http(BODY, sign(BODY, Secret(SECRET))))
    assert status == 500
    assert set(said) == {"message"}
    assert "Configuration error" in caplog.text
    assert SECRET not in caplog.text


def test_a_cold_import_is_fast():
    """The best of five processes, as other work on the machine is not meant."""
    code = "import time; t = time.perf_counter(); import relay.aws.updater; print(time.perf_counter() - t)"
    took = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True
            ).stdout
        )
        for _ in range(5)
    ]
    assert min(took) < LONGEST_IMPORT


class RuntimeAPI:
    """Lambda's side of a function: it fetches events there and posts its answers."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[object] = asyncio.Queue()
        self.answers: asyncio.Queue[tuple[str, dict]] = asyncio.Queue()
        self.port = 0

    async def invoke(self, event: object) -> dict:
        self.events.put_nowait(event)
        async with asyncio.timeout(PATIENCE):
            kind, answer = await self.answers.get()
        assert kind == "response", answer
        return answer

    async def _next(self, _: web.Request) -> web.Response:
        event = await self.events.get()
        deadline = 2**42
        headers = {
            "Lambda-Runtime-Aws-Request-Id": "r1",
            "Lambda-Runtime-Deadline-Ms": str(deadline),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:1:function:updater",
            "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700",
        }
        # As Lambda sends it: the client decodes no other type, not even with a charset.
        headers["Content-Type"] = "application/json"
        return web.Response(body=json.dumps(event).encode(), headers=headers)

    async def _take(self, request: web.Request) -> web.Response:
        self.answers.put_nowait((request.match_info["kind"], await request.json()))
        return web.Response(status=202)

    @asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_get("/2018-06-01/runtime/invocation/next", self._next)
        app.router.add_post("/2018-06-01/runtime/invocation/r1/{kind}", self._take)
        app.router.add_post("/2018-06-01/runtime/init/{kind}", self._take)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


async def test_under_lambdas_own_runtime_client(redis, tmp_path):
    """Several invocations of one instance, with a home that cannot be written."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    async with ScriptedUpstream() as upstream, RuntimeAPI().running() as api:
        upstream.serve(SDK_KEY, all_data(flag(value="one")))
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(home),
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.port}",
            "LAMBDA_TASK_ROOT": str(ROOT),
            "_HANDLER": "relay.aws.updater.handler",
            **variables(upstream.url, redis),
        }
        command = [sys.executable, "-m", "awslambdaric", environ["_HANDLER"]]
        with (tmp_path / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=home, env=environ, stdout=log, stderr=log
            )
        try:
            for version, value in enumerate(("one", "two", "three"), 1):
                upstream.serve(SDK_KEY, all_data(flag(value=value, version=version)))
                body = announcing(version, f"run-{version}")
                answer = await api.invoke(http(body, sign(body, Secret(SECRET)), encoded=True))
                assert answer["statusCode"] == 200, answer
                assert stored(redis) == value
            assert (await api.invoke({"source": "aws.events"}))["statusCode"] == 403
            assert process.returncode is None
            assert not list(home.iterdir())
            said = (tmp_path / "log").read_text()
            assert '"main" is up to date' in said
            assert SECRET not in said
            assert SDK_KEY not in said
        finally:
            process.kill()
            await process.wait()
