"""A Lambda function that brings the database up to date when LaunchDarkly's webhook calls it.

    handler: relay.aws.updater.handler

It is configured by the variables of the relay; `WEBHOOK_SECRET` is required. Behind API Gateway
(payload formats 1.0 and 2.0) or a function URL it demands a signature. Invoked in any other way, by
a schedule or the console, it works only with `UPDATER_ALLOW_INVOKE=true`: who may do that is then
IAM's decision. Nothing is written to disk.
"""

# ruff: noqa: PLC0415 - a cold start that refuses a request needs neither HTTP client nor database

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relay.errors import ConfigError, InvalidData, RelayError
from relay.protocol import webhook
from relay.protocol.webhook import EVERYTHING, ChangedResource, ChangeNotice
from relay.telemetry.log import LEVELS

if TYPE_CHECKING:
    from relay.config.schema import Config
    from relay.model.payload import Payload
    from relay.sync import SyncChanges, SyncResult

ALLOW_INVOKE = "UPDATER_ALLOW_INVOKE"
"""The variable that allows invocations without a signature."""

LOOKS: tuple[float, ...] = (2.0, 5.0, 15.0)
"""Seconds after the start at which upstream is asked again while it does not have what the webhook
announces."""

VAGUE_LOOKS = LOOKS[:1]
"""The same for a webhook that names no version: the two seconds of LaunchDarkly's guide."""

LAST_LOOK = 4.0
"""Seconds before the end of the time after which no further look is worth its answer."""

LONGEST = 25.0
"""Seconds for everything: API Gateway waits for 29."""

SHORTEST = 0.5
"""Seconds that are tried in any case."""

RESERVE = 1.5
"""Seconds of the function's own time limit that are left for the answer."""

REMEMBERED = 1000
"""Webhooks whose work is done that are known again, as long as this instance lives."""

_log = logging.getLogger("relay.updater")
_said: set[str] = set()
"""Warnings of the configuration that are in this instance's log."""
_done: OrderedDict[str, None] = OrderedDict()


class _Refused(RelayError):
    """The request is answered without any work."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Request:
    """What there is to do.

    Args:
        announced: what has changed.
        name: by which it is known again; empty if it cannot come twice.
    """

    announced: ChangeNotice
    name: str = ""


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Bring the database up to date, and say what was done.

    Args:
        event: of API Gateway, of a function URL, or anything else.
        context: Lambda's, which knows how much time is left.

    Returns:
        A response in the form of API Gateway: 200 if all environments concerned are up to date, 502
        if some are not, 4xx if the request is refused, 500 if the configuration cannot be used.
    """
    began = time.monotonic()
    _prepare_log()
    try:
        config = _configuration(os.environ)
        request = _understood(event, config)
        if request.name in _done:
            return _answer(200, "known already")
        outcomes = _synchronised(config, request.announced, began + _seconds(context))
    except _Refused as e:
        _log.warning("A request is refused (%d): %s", e.status, e)
        return _answer(e.status, str(e))
    except ConfigError as e:
        _log.error("Configuration error: %s", e)
        return _answer(500, "the configuration cannot be used; the function's log tells why")
    failed = any(outcome.problem for outcome in outcomes.values())
    if request.name and not failed:
        _done[request.name] = None
        if len(_done) > REMEMBERED:
            _done.popitem(last=False)
    message = "some environments are not up to date" if failed else "up to date"
    report = {name: _report(outcome) for name, outcome in outcomes.items()}
    return _answer(502 if failed else 200, message, environments=report)


def _prepare_log() -> None:
    """Let our lines through: Lambda's own handler stands at WARN."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(format="%(levelname)s: %(message)s")
    level = os.environ.get("LOG_LEVEL", "info").strip().lower()
    logging.getLogger("relay").setLevel(LEVELS.get(level, logging.INFO))


def _configuration(environ: Mapping[str, str]) -> Config:
    from relay.config.load import load

    config = load("", from_env=True, allow_missing_file=True, environ=environ)
    for warning in config.warnings:
        if warning not in _said:
            _said.add(warning)
            _log.warning("%s", warning)
    if not config.webhook.secrets and not _allows_invoke(environ):
        raise ConfigError([f"WEBHOOK_SECRET is not set (nor {ALLOW_INVOKE})"])
    return config


def _allows_invoke(environ: Mapping[str, str]) -> bool:
    return environ.get(ALLOW_INVOKE, "").strip().lower() in ("true", "yes", "1")


def _understood(event: Any, config: Config) -> _Request:
    """Return what an event asks for.

    Raises:
        _Refused: it may not ask, or makes no sense.
    """
    method = _method(event)
    if method is None:
        if not _allows_invoke(os.environ):
            reason = f"only signed webhooks are accepted; {ALLOW_INVOKE}=true allows invocations"
            raise _Refused(403, reason)
        return _Request(EVERYTHING)
    if method != "POST":
        raise _Refused(405, "a webhook is a POST")
    signature = _signature(event)
    body = _body(event)
    if not webhook.is_signed(body, signature, config.webhook.secrets):
        raise _Refused(401, "the signature in X-LD-Signature is missing or wrong")
    try:
        announced = webhook.read(body)
    except InvalidData as e:
        raise _Refused(400, str(e)) from e
    return _Request(announced, announced.id or signature)


def _method(event: Any) -> str | None:
    """Return the HTTP method of a request; None for what did not come by HTTP (webhooks 12.4)."""
    if not isinstance(event, dict) or not isinstance(event.get("requestContext"), dict):
        return None
    if event.get("version") == "2.0":
        http = event["requestContext"].get("http")
        return str(http["method"]) if isinstance(http, dict) and "method" in http else None
    return str(event["httpMethod"]) if "httpMethod" in event else None


def _signature(event: Mapping[str, Any]) -> str:
    for member in ("headers", "multiValueHeaders"):
        for name, value in (event.get(member) or {}).items():
            if name.lower() == "x-ld-signature" and value:
                return value if isinstance(value, str) else str(value[0])
    return ""


def _body(event: Mapping[str, Any]) -> bytes:
    """Return the body as it was on the wire."""
    given = event.get("body") or ""
    if not isinstance(given, str) or len(given) > 2 * webhook.MAX_BODY:
        raise _Refused(413, "the body is too long")
    if not event.get("isBase64Encoded"):
        body = given.encode("utf-8", "surrogatepass")
    else:
        try:
            body = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError) as e:
            raise _Refused(400, "the body is not the base64 that it claims to be") from e
    if len(body) > webhook.MAX_BODY:
        raise _Refused(413, "the body is too long")
    return body


def _seconds(context: Any) -> float:
    """Return how long the work may take."""
    left = getattr(context, "get_remaining_time_in_millis", None)
    return min(LONGEST, left() / 1000 - RESERVE) if left else LONGEST


def _synchronised(config: Config, announced: ChangeNotice, until: float) -> dict[str, SyncResult]:
    """Do the work within the time; a loop of its own leaves nothing open between invocations."""
    import asyncio

    from relay.build import sync_targets
    from relay.sync import SyncOptions, synchronise

    session, found = sync_targets(config)
    concerned = announced.concerning(way.spec for way in found)
    seconds = max(SHORTEST, until - time.monotonic())

    def seen(name: str, payload: Payload, changes: SyncChanges) -> bool:
        return _is_seen(concerned[name], payload, changes)

    versioned = any(place.version for places in concerned.values() for place in places)
    looks = LOOKS if versioned else VAGUE_LOOKS
    if announced is EVERYTHING:
        looks = ()  # nothing in particular is awaited
    looks = tuple(at for at in looks if at <= seconds - LAST_LOOK)
    plan = SyncOptions(seconds, recheck_after=looks, is_seen=seen)
    chosen = [way for way in found if way.spec.name in concerned]
    return asyncio.run(synchronise(chosen, session, plan, _print))


def _is_seen(places: tuple[ChangedResource, ...], payload: Payload, changes: SyncChanges) -> bool:
    """Whether upstream has what was announced, or some change where nothing particular was."""
    from relay.model.item import Kind

    versions = {place.flag: place.version for place in places if place.version}
    if not versions:
        return bool(changes)
    items = {flag: payload.all(Kind.FLAG).get(flag) for flag in versions}
    return all(item is not None and item.version >= versions[f] for f, item in items.items())


def _print(outcome: SyncResult) -> None:
    if outcome.problem:
        _log.error('"%s" is not up to date: %s', outcome.name, outcome.problem)
    else:
        _log.info('"%s" is up to date: %s', outcome.name, json.dumps(outcome.changes.counts()))


def _report(outcome: SyncResult) -> dict[str, Any]:
    if outcome.problem:
        return {"problem": "not up to date; the function's log tells why"}
    return {**outcome.changes.counts(), "items": outcome.items}


def _answer(status: int, message: str, **more: Any) -> dict[str, Any]:
    return {
        "statusCode": status,
        "headers": {"content-type": "application/json"},
        "body": json.dumps({"message": message, **more}),
    }
