"""`relay eval FLAG --context JSON`: evaluate a flag for a context and print the trace.

The flag and everything that it depends on are read from a file or from a running relay.
"""

# ruff: noqa: PLC0415 - databases are imported where they are wanted

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, Never
from urllib.error import HTTPError
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    ProxyHandler,
    Request,
    build_opener,
)

from msgspec.structs import replace
from yarl import URL

from relay.config.types import HTTP_URI, KEY, REDIS_URIS, OptionType
from relay.errors import ConfigError, InvalidData, RelayError, StoreUnavailable
from relay.evaluation.data import Data, Membership
from relay.evaluation.evaluator import evaluate
from relay.evaluation.results import value
from relay.model.context import Context, parse_context
from relay.model.credential import Secret
from relay.model.payload import Payload
from relay.protocol import fdv1, filedata
from relay.protocol.bigsegments import context_hash
from relay.protocol.urls import data_url
from relay.proxies import environment_proxies
from relay.reasons import describe, shorten
from relay.stores.bigsegments import BigSegmentStore
from relay.tls import client_context

USAGE = """relay eval FLAG --context JSON --flags FILE
       relay eval FLAG --context JSON --url URL --sdk-key KEY [--filter KEY]
each with [--redis URL [--redis-cluster] | --dynamodb TABLE] [--prefix PREFIX] for members of big
segments"""

TIME_LIMIT = 30.0
"""Timeout in seconds for connecting to a relay, and for each read."""

MAX_DATA = 128 * 1024 * 1024
"""Maximum bytes of a relay's response: as much as upstream may send at once."""


class EvalError(RelayError):
    """The evaluation is impossible; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise EvalError(f"{message}\nusage: {USAGE}")


class _NoRedirects(HTTPRedirectHandler):
    """Sends the SDK key to the named host only."""

    def redirect_request(  # noqa: PLR0917 - the library's
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Refuse the redirect, which makes it an error."""


def main(arguments: Sequence[str]) -> int:
    """Print the result and return 0, or print an error and return 1."""
    try:
        output = _evaluate(_parser().parse_args(arguments))
    except (EvalError, InvalidData) as e:
        sys.stderr.write(f"Error: {e}\n")
        return 1
    sys.stdout.write(output)
    return 0


def _parser() -> _Parser:
    parser = _Parser("relay eval", usage=USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("flag", metavar="FLAG", help="key of the flag")
    add("--context", metavar="JSON", required=True, help="who asks: a context or a legacy user")
    add("--flags", metavar="FILE", help="a file of flags, as for relay serve --flags")
    add("--url", metavar="URL", help="a running relay, such as http://localhost:8030")
    add("--sdk-key", metavar="KEY", help="the SDK key of the environment in that relay")
    add("--filter", metavar="KEY", default="", help="a payload filter, to see what it leaves in")
    add("--redis", metavar="URL", help="the database with the members of big segments")
    add("--redis-cluster", action="store_true", help="that database is a Redis Cluster")
    add("--dynamodb", metavar="TABLE", help="the same in AWS, as its tools find it")
    add(
        "--prefix", metavar="PREFIX", default="", help="of its keys; in Redis launchdarkly if empty"
    )
    return parser


def _evaluate(options: argparse.Namespace) -> str:
    context = parse_context(options.context.encode(errors="replace"))
    if context.has_empty_key:
        raise EvalError("context: the key of a user must not be empty")
    if bool(options.flags) == bool(options.url):
        raise EvalError("name either a file with --flags or a relay with --url")
    if options.url and not options.sdk_key:
        raise EvalError("--url needs the --sdk-key of the environment")
    if options.filter and not options.url:
        raise EvalError("--filter needs a relay with --url")
    if options.redis and options.dynamodb:
        raise EvalError("name one database, with --redis or with --dynamodb")
    if options.redis_cluster and not options.redis:
        raise EvalError("--redis-cluster needs a database with --redis")
    if options.prefix and not (options.redis or options.dynamodb):
        raise EvalError("--prefix needs a database with --redis or --dynamodb")
    if options.flags:
        payload = _read_flags(options.flags)
    else:
        key: Secret = _parse_option("--sdk-key", KEY, options.sdk_key)
        base = _parse_option("--url", HTTP_URI, options.url)
        payload = _fetch_flags(data_url(base, "/sdk/latest-all", options.filter), key.reveal())
    data = Data.of(payload)
    if options.redis or options.dynamodb:
        data = replace(data, memberships=asyncio.run(_read_members(options, context)))
    return _explain(data, options.flag, context)


async def _read_members(options: argparse.Namespace, context: Context) -> dict[str, Membership]:
    """Return the memberships of a context in big segments, by context key."""
    from relay.bigsegments.environment import status_of

    keys = list({each.key: None for each in context.individuals.values()})
    try:
        store = _members_store(options)
        try:
            status = status_of(await store.metadata())
            found = await store.memberships([context_hash(key) for key in keys])
        finally:
            await store.aclose()
    except (StoreUnavailable, ConfigError) as e:
        raise EvalError(f"the database cannot be asked: {e}") from e
    return {key: Membership(status, each) for key, each in zip(keys, found, strict=True)}


def _members_store(options: argparse.Namespace) -> BigSegmentStore:
    if options.redis:
        from relay.config.schema import Redis
        from relay.stores.redis.connect import connect as connect_to_redis
        from relay.stores.redis.divided_bigsegments import big_segment_store

        url = _parse_option("--redis", REDIS_URIS, options.redis)
        database = Redis(url=url, cluster=options.redis_cluster)
        return big_segment_store(connect_to_redis(database), options.prefix)
    try:
        from relay.stores.dynamodb.bigsegments import DynamoDBBigSegmentStore
        from relay.stores.dynamodb.connect import connect
    except ImportError as e:
        text = "--dynamodb needs the libraries for AWS: pip install 'relay[aws]'"
        raise EvalError(text) from e
    connection = connect("", os.environ)
    return DynamoDBBigSegmentStore(connection.share(), options.dynamodb, options.prefix)


def _parse_option(option: str, kind: OptionType, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as e:
        raise EvalError(f"{option}: {e}") from e


def _read_flags(name: str) -> Payload:
    try:
        text = Path(name).read_bytes()
    except OSError as e:
        raise EvalError(f"{name} cannot be read: {describe(e)}") from e
    return Payload.of(filedata.numbered(filedata.read(text, name), {}, 1, name))


def _fetch_flags(url: str, key: str) -> Payload:
    try:
        request = Request(url, headers={"Authorization": key})  # noqa: S310
        proxy = environment_proxies(os.environ)(URL(url))
        if proxy:
            request.set_proxy(proxy.url.authority, proxy.url.scheme)
            if proxy.authorization:
                request.add_header("Proxy-Authorization", proxy.authorization)
        handlers = [HTTPSHandler(context=client_context())] if url.startswith("https:") else []
        opener = build_opener(ProxyHandler({}), *handlers, _NoRedirects)
        with opener.open(request, timeout=TIME_LIMIT) as response:
            body: bytes = response.read(MAX_DATA + 1)
    except HTTPError as e:
        e.close()
        raise EvalError(f"the relay answers with status {e.code}") from e
    except ValueError as e:  # its message may quote the key, so it is not repeated
        raise EvalError("the relay cannot be asked: URL or key is malformed") from e
    except (OSError, HTTPException, RelayError) as e:
        cause = getattr(e, "reason", e)
        reason = describe(cause) if isinstance(cause, Exception) else shorten(str(cause))
        raise EvalError(f"the relay cannot be asked: {reason}") from e
    if len(body) > MAX_DATA:
        raise EvalError(f"the relay's data are longer than {MAX_DATA} bytes")
    return Payload.of(fdv1.parse_all(body).items)


def _explain(data: Data, key: str, context: Context) -> str:
    flag = data.flag(key)
    if flag is None:
        raise EvalError(f'flag "{key}" is unknown')
    detail = evaluate(flag, context, data)
    variation: Any = "none" if detail.variation is None else detail.variation
    lines = [
        f"value      {value(flag, detail).decode()}",
        f"variation  {variation}",
        f"reason     {detail.reason.json().decode()}",
        "because",
        *(f"  {step}" for step in detail.steps),
    ]
    return "\n".join(lines) + "\n"
