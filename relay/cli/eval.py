"""`relay eval FLAG --context JSON`: what a flag gives to a context, and what led there.

The flag comes from a file, or from a running relay, with all that it depends on.
"""

from __future__ import annotations

import argparse
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

from yarl import URL

from relay.config.types import HTTP_URI, KEY, OptionType
from relay.errors import InvalidData, RelayError
from relay.evaluation.data import Data
from relay.evaluation.evaluator import evaluate
from relay.evaluation.results import value
from relay.model.context import Context, parse_context
from relay.model.credential import Secret
from relay.model.payload import Payload
from relay.protocol import fdv1, filedata
from relay.protocol.urls import join
from relay.proxies import environment_proxies
from relay.reasons import describe, shorten
from relay.tls import client_context

USAGE = """relay eval FLAG --context JSON --flags FILE
       relay eval FLAG --context JSON --url URL --sdk-key KEY"""

TIME_LIMIT = 30.0
"""Seconds that a relay may be silent."""

MAX_DATA = 128 * 1024 * 1024
"""Bytes of flags: as much as upstream may send at once."""


class Unanswerable(RelayError):
    """The question cannot be answered; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise Unanswerable(f"{message}\nusage: {USAGE}")


class _NoRedirects(HTTPRedirectHandler):
    """The SDK key goes to the host that was named, and to no other."""

    def redirect_request(  # noqa: PLR0917 - the library's
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Follow nothing; the redirect becomes an error."""


def main(arguments: Sequence[str]) -> int:
    """Print the answer and return 0, or say why there is none and return 1."""
    try:
        answer = _answer(_parser().parse_args(arguments))
    except (Unanswerable, InvalidData) as e:
        sys.stderr.write(f"Error: {e}\n")
        return 1
    sys.stdout.write(answer)
    return 0


def _parser() -> _Parser:
    parser = _Parser("relay eval", usage=USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("flag", metavar="FLAG", help="key of the flag")
    add("--context", metavar="JSON", required=True, help="who asks: a context or a legacy user")
    add("--flags", metavar="FILE", help="a file of flags, as for relay serve --flags")
    add("--url", metavar="URL", help="a running relay, such as http://localhost:8030")
    add("--sdk-key", metavar="KEY", help="the SDK key of the environment in that relay")
    return parser


def _answer(options: argparse.Namespace) -> str:
    context = parse_context(options.context.encode(errors="replace"))
    if context.has_empty_key:
        raise Unanswerable("context: the key of a user must not be empty")
    if bool(options.flags) == bool(options.url):
        raise Unanswerable("name either a file with --flags or a relay with --url")
    if options.url and not options.sdk_key:
        raise Unanswerable("--url needs the --sdk-key of the environment")
    if options.flags:
        payload = _read(options.flags)
    else:
        key: Secret = _parsed("--sdk-key", KEY, options.sdk_key)
        payload = _fetch(_parsed("--url", HTTP_URI, options.url), key.reveal())
    return _explained(Data.of(payload), options.flag, context)


def _parsed(option: str, kind: OptionType, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as e:
        raise Unanswerable(f"{option}: {e}") from e


def _read(name: str) -> Payload:
    try:
        text = Path(name).read_bytes()
    except OSError as e:
        raise Unanswerable(f"{name} cannot be read: {describe(e)}") from e
    return Payload.of(filedata.numbered(filedata.read(text, name), {}, 1, name))


def _fetch(url: str, key: str) -> Payload:
    try:
        request = Request(join(url, "/sdk/latest-all"), headers={"Authorization": key})  # noqa: S310
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
        raise Unanswerable(f"the relay answers with status {e.code}") from e
    except ValueError as e:  # whose text may quote the key
        raise Unanswerable("the relay cannot be asked: URL or key is malformed") from e
    except (OSError, HTTPException, RelayError) as e:
        cause = getattr(e, "reason", e)
        why = describe(cause) if isinstance(cause, Exception) else shorten(str(cause))
        raise Unanswerable(f"the relay cannot be asked: {why}") from e
    if len(body) > MAX_DATA:
        raise Unanswerable(f"the relay's data are longer than {MAX_DATA} bytes")
    return Payload.of(fdv1.parse_all(body).items)


def _explained(data: Data, key: str, context: Context) -> str:
    flag = data.flag(key)
    if flag is None:
        raise Unanswerable(f'flag "{key}" is unknown')
    evaluation = evaluate(flag, context, data)
    variation: Any = "none" if evaluation.variation is None else evaluation.variation
    lines = [
        f"value      {value(flag, evaluation).decode()}",
        f"variation  {variation}",
        f"reason     {evaluation.reason.json().decode()}",
        "because",
        *(f"  {step}" for step in evaluation.steps),
    ]
    return "\n".join(lines) + "\n"
