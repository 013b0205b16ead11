"""`relay eval`: what it shows, from a file and from a running relay, and how it fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.cli.eval import main as evaluate
from tests.support.authorities import UNTIDY, Authority
from tests.support.data import flag, segment
from tests.support.dynamodb import VARIABLES, DynamoDBServer
from tests.support.process import PATIENCE, ROOT, RelayProcess
from tests.support.proxy import a_proxy
from tests.support.redis import RedisServer
from tests.support.rediscluster import Cluster
from tests.support.serving import until
from tests.support.upstream import context_hash

ANNA = '{"kind":"user","key":"anna","plan":"pro"}'
CONTENTS = {
    "flags": {
        "lamp": flag(
            variations=[False, 12345678901234567890],
            prerequisites=[{"key": "power", "variation": 0}],
            rules=[
                {
                    "id": "crew",
                    "clauses": [{"attribute": "", "op": "segmentMatch", "values": ["crew"]}],
                    "rollout": {"variations": [{"variation": 1, "weight": 100_000}]},
                }
            ],
        ),
        "power": flag("power", targets=[{"variation": 0, "values": ["anna"]}]),
    },
    "segments": {
        "crew": segment(
            "crew", rules=[{"clauses": [{"attribute": "plan", "op": "in", "values": ["pro"]}]}]
        )
    },
}
ANSWER = """\
value      12345678901234567890
variation  1
reason     {"kind":"RULE_MATCH","ruleIndex":0,"ruleId":"crew"}
because
  prerequisite "power" must give variation 0
    its key is listed for variation 0
  prerequisite "power" gives variation 0
  rule 0 "crew"
  segment "crew"
    user plan in ["pro"]: matches
  segment "crew" contains it
  user segmentMatch ["crew"]: matches
  bucket"""


@pytest.fixture
def flags(tmp_path) -> Path:
    """A file of flags."""
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(CONTENTS))
    return path


def test_a_flag_of_a_file_is_explained(flags, capsys):
    """Value, variation and reason, then the prerequisite, rule, segment, clause and bucket."""
    assert evaluate(["lamp", "--context", ANNA, "--flags", str(flags)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(ANSWER)
    assert err == ""


def test_it_is_a_command_of_the_program(flags):
    """`python -m relay eval` is the same, with its exit codes."""
    for key, code in (("lamp", 0), ("none", 1)):
        command = [sys.executable, "-m", "relay", "eval", key, "--context", ANNA, "--flags", flags]
        done = subprocess.run(
            command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == code
        assert done.stdout.startswith(ANSWER if code == 0 else "")
        assert bool(done.stderr) is bool(code)


async def test_a_flag_of_a_running_relay_is_explained(flags, tmp_path, capsys):
    """The relay that serves the file gives the same answer."""
    async with RelayProcess(tmp_path, "serve", "--flags", str(flags)) as relay:
        options = ["--url", relay.url, "--sdk-key", "sdk-demo"]
        await until(lambda: evaluate(["lamp", "--context", ANNA, *options]) == 0, PATIENCE)
        assert ANSWER in capsys.readouterr().out
        secret = "sdk-wrong-key-of-somebody"
        options[-1] = secret
        assert evaluate(["lamp", "--context", ANNA, *options]) == 1
        error = capsys.readouterr().err
        assert "Error: the relay answers with status 401" in error
        assert secret not in error


async def test_a_relay_over_tls_is_asked_as_launchdarkly_is(flags, tmp_path, capsys, monkeypatch):
    """The same authorities, the same proxies; what is not trusted is said in OpenSSL's words."""
    authority = Authority(tmp_path, **UNTIDY["neither, and no key identifiers"])
    certificate, key = authority.issue("localhost", "relay.example")
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(certificate), "TLS_KEY": str(key)}
    async with RelayProcess(tmp_path, "serve", "--flags", str(flags), **tls) as relay:
        await relay.said("Initialized")
        asked = ["lamp", "--context", ANNA, "--sdk-key", "sdk-demo", "--url"]
        assert await asyncio.to_thread(evaluate, [*asked, relay.url]) == 1
        error = capsys.readouterr().err
        assert "the relay cannot be asked: unable to get local issuer certificate" in error
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        assert await asyncio.to_thread(evaluate, [*asked, relay.url]) == 0
        async with a_proxy("Basic bWU6cMO8") as (port, seen):
            monkeypatch.setenv("HTTPS_PROXY", f"me:p%C3%BC@127.0.0.1:{port}")
            for url, heads in ((relay.url, 0), (f"https://relay.example:{relay.port}", 1)):
                assert await asyncio.to_thread(evaluate, [*asked, url]) == 0
                assert len(seen) == heads


def test_a_key_that_cannot_be_sent_is_not_shown(capsys):
    """The place of what is wrong with it is."""
    options = ["--url", "http://127.0.0.1:1", "--sdk-key", "sdk-sec\nret"]
    assert evaluate(["lamp", "--context", ANNA, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: --sdk-key: ")
    assert "ret" not in error


@pytest.mark.parametrize(
    ("key", "context", "error"),
    [
        ("none", ANNA, 'Error: flag "none" is unknown\n'),
        ("lamp", "{nope", "Error: context: JSON is malformed"),
        ("lamp", '{"kind":"user"}', 'Error: context: "key" must be a string'),
        ("lamp", '{"key":""}', "Error: context: the key of a user must not be empty\n"),
    ],
)
def test_what_cannot_be_evaluated_is_said(flags, capsys, key, context, error):
    """An unknown flag or a broken context is an error of one line."""
    assert evaluate([key, "--context", context, "--flags", str(flags)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(error)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "arguments are required: FLAG, --context"),
        (["lamp"], "arguments are required: --context"),
        (["lamp", "--context", ANNA], "either a file with --flags or a relay with --url"),
        (["lamp", "--context", ANNA, "--flags", "a", "--url", "b"], "either a file"),
        (["lamp", "--context", ANNA, "--url", "http://h"], "--url needs the --sdk-key"),
        (
            ["lamp", "--context", ANNA, "--url", "file:///x", "--sdk-key", "k"],
            "--url: must be a URL that begins with http",
        ),
        (
            ["lamp", "--context", ANNA, "--url", "http://[", "--sdk-key", "k"],
            "--url: not a valid URL",
        ),
        (
            ["lamp", "--context", ANNA, "--url", "http://h", "--sdk-key", "a b"],
            "--sdk-key: a key has",
        ),
        (
            ["lamp", "--context", ANNA, "--url", "http://127.0.0.1:1", "--sdk-key", "k"],
            "cannot be asked: Connection refused",
        ),
        (["lamp", "--context", ANNA, "--flags", "/no/such/file"], "/no/such/file cannot be read"),
        (
            ["lamp", "--context", ANNA, "--flags", "a", "--filter", "f"],
            "--filter needs a relay with --url",
        ),
        (["lamp", "--context", ANNA, "--sdk-keys", "x", "--flags", "a"], "unrecognized arguments"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(capsys, arguments, error):
    """The error names the argument that is missing or wrong."""
    assert evaluate(arguments) == 1
    assert error in capsys.readouterr().err


def big_segment_flags(folder: Path) -> Path:
    """A file with a flag for the members of a big segment."""
    clause = {"attribute": "", "op": "segmentMatch", "values": ["team"]}
    rule = {"clauses": [clause], "variation": 1}
    contents = {
        "flags": {"lamp": flag(variations=["no", "yes"], rules=[rule])},
        "segments": {"team": segment("team", unbounded=True, generation=2)},
    }
    path = folder / "flags.json"
    path.write_text(json.dumps(contents))
    return path


def test_members_of_big_segments_are_read(tmp_path, capsys):
    """From the database that is named; the reason tells how recent they are."""
    flags = big_segment_flags(tmp_path)
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        redis.do("SADD", f"prod:big_segment_include:{context_hash('anna')}", "team.g2")
        ask = ["lamp", "--context", ANNA, "--flags", str(flags)]
        asked = [*ask, "--redis", redis.url]
        assert evaluate([*asked, "--prefix", "prod"]) == 0
        found = capsys.readouterr().out
        assert 'value      "yes"' in found
        assert '"bigSegmentsStatus":"STALE"' in found
        redis.do("SET", "prod:big_segments_synchronized_on", str(int(time.time() * 1000)))
        assert evaluate([*asked, "--prefix", "prod"]) == 0
        assert '"bigSegmentsStatus":"HEALTHY"' in capsys.readouterr().out
        assert evaluate(asked) == 0
        assert 'value      "no"' in capsys.readouterr().out
        assert evaluate(ask) == 0
        assert '"bigSegmentsStatus":"NOT_CONFIGURED"' in capsys.readouterr().out


def test_members_are_read_from_a_cluster(tmp_path, capsys):
    """The keys of a context may be on any of its servers; without the option the error names it."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    flags = big_segment_flags(tmp_path)
    with Cluster(folder) as cluster:
        cluster.do("SADD", f"prod:big_segment_include:{context_hash('anna')}", "team.g2")
        url = cluster.servers[1].url
        asked = ["lamp", "--context", ANNA, "--flags", str(flags), "--redis", url]
        assert evaluate([*asked, "--prefix", "prod", "--redis-cluster"]) == 0
        assert 'value      "yes"' in capsys.readouterr().out
        assert evaluate([*asked, "--prefix", "prod"]) == 1
        assert "REDIS_CLUSTER=true" in capsys.readouterr().err


def test_members_of_big_segments_are_read_from_dynamodb(tmp_path, capsys, monkeypatch):
    """Where AWS's variables say."""
    ask = ["lamp", "--context", ANNA, "--flags", str(big_segment_flags(tmp_path))]
    with DynamoDBServer() as server:
        for name, value in {**VARIABLES, "AWS_ENDPOINT_URL_DYNAMODB": server.url}.items():
            monkeypatch.setenv(name, value)
        table = server.new_table()
        asked = [*ask, "--dynamodb", table.name]
        key = {"namespace": {"S": "prod:big_segments_user"}, "key": {"S": context_hash("anna")}}
        item = {**key, "included": {"SS": ["team.g2"]}}
        server.client.put_item(TableName=table.name, Item=item)
        assert evaluate([*asked, "--prefix", "prod"]) == 0
        found = capsys.readouterr().out
        assert 'value      "yes"' in found
        assert '"bigSegmentsStatus":"STALE"' in found
        assert evaluate(asked) == 0
        assert 'value      "no"' in capsys.readouterr().out
        table.drop()
        assert evaluate(asked) == 1
        assert f'the database cannot be asked: there is no table "{table.name}"' in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--prefix", "p"], "--prefix needs a database with --redis or --dynamodb"),
        (["--redis-cluster"], "--redis-cluster needs a database with --redis"),
        (["--redis", "redis://x", "--dynamodb", "t"], "name one database"),
        (["--redis", "redis://127.0.0.1:1"], "the database cannot be asked: "),
        (["--redis", "redis://127.0.0.1:1/x"], "the database cannot be asked: "),
    ],
)
def test_a_database_that_cannot_be_asked_is_an_error(tmp_path, capsys, arguments, error):
    """It says why."""
    flags = big_segment_flags(tmp_path)
    assert evaluate(["lamp", "--context", ANNA, "--flags", str(flags), *arguments]) == 1
    assert error in capsys.readouterr().err
