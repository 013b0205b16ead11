"""Lambda function that brings the database up to date when a LaunchDarkly webhook calls it.

    handler: relay.aws.updater.handler

The relay's environment variables configure it; `WEBHOOK_SECRET` is required. Requests through API
Gateway (payload formats 1.0 and 2.0) or a function URL must be signed. Any other invocation, such
as by a schedule or from the console, requires `UPDATER_ALLOW_INVOKE=true`, which leaves access
control to IAM. Nothing is written to disk.
"""

# ruff: noqa: PLC0415 - a cold start that refuses a request needs neither HTTP client nor database

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relay import clock
from relay.errors import ConfigError, InvalidData, RelayError
from relay.lru import LRUMap
from relay.protocol import webhook
from relay.protocol.webhook import EVERYTHING, ChangedResource, ChangeNotice
from relay.telemetry.log import LEVELS

if TYPE_CHECKING:
    from relay.config.schema import Config
    from relay.model.payload import Payload
    from relay.sync import SyncChanges, SyncResult

ALLOW_INVOKE = "UPDATER_ALLOW_INVOKE"
"""Variable that permits invocations without a signature."""

RECHECK_AFTER: tuple[float, ...] = (2.0, 5.0, 15.0)
"""Seconds after the start at which to check upstream again, until it has the announced change."""

RECHECK_AFTER_UNVERSIONED = RECHECK_AFTER[:1]
"""The same for a webhook that names no version: the two seconds of LaunchDarkly's guide."""

RECHECK_MARGIN = 4.0
"""Seconds that a recheck needs before the time limit; later ones are skipped."""

MAX_DURATION = 25.0
"""Time limit of an invocation in seconds; API Gateway waits for 29."""

MIN_DURATION = 0.5
"""Seconds to try in any case."""

RESERVE = 1.5
"""Seconds of the function's own time limit to reserve for the response."""

MAX_DONE = 1000
"""Maximum number of completed webhooks that this instance remembers."""

_log = logging.getLogger("relay.updater")
_logged_warnings: set[str] = set()
"""Configuration warnings that this instance has logged."""
_done: LRUMap[str, None] = LRUMap(MAX_DONE)
"""Names of completed requests."""


class _RequestRejected(RelayError):
    """The request is rejected with an HTTP status, without any work."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Request:
    """Work to do.

    Args:
        notice: announced changes.
        name: identifies repeated deliveries of a webhook; empty for other invocations.
    """

    notice: ChangeNotice
    name: str = ""


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Bring the database up to date, and report the changes.

    Args:
        event: event of API Gateway, of a function URL, or any other.
        context: Lambda context, which knows the remaining time.

    Returns:
        A response in API Gateway's format: 200 if all affected environments are up to date, 502 if
        some are not, 4xx if the request is rejected, 500 if the configuration is invalid.
    """
    started = clock.monotonic()
    _prepare_log()
    try:
        config = _configuration(os.environ)
        request = _parse(event, config)
        if request.name in _done:
            return _response(200, "known already")
        results = _synchronise(config, request.notice, started + _time_limit(context))
    except _RequestRejected as e:
        _log.warning("A request is refused (%d): %s", e.status, e)
        return _response(e.status, str(e))
    except ConfigError as e:
        _log.error("Configuration error: %s", e)
        return _response(500, "the configuration cannot be used; the function's log tells why")
    failed = any(result.problem for result in results.values())
    if request.name and not failed:
        _done.put(request.name, None)
    message = "some environments are not up to date" if failed else "up to date"
    report = {name: _report(result) for name, result in results.items()}
    return _response(502 if failed else 200, message, environments=report)


def _prepare_log() -> None:
    """Set the level of the relay's loggers: Lambda's root logger only passes warnings."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(format="%(levelname)s: %(message)s")
    level = os.environ.get("LOG_LEVEL", "info").strip().lower()
    logging.getLogger("relay").setLevel(LEVELS.get(level, logging.INFO))


def _configuration(environ: Mapping[str, str]) -> Config:
    from relay.config.load import load

    config = load("", from_env=True, allow_missing_file=True, environ=environ)
    for warning in config.warnings:
        if warning not in _logged_warnings:
            _logged_warnings.add(warning)
            _log.warning("%s", warning)
    if not config.webhook.secrets and not _allows_invoke(environ):
        raise ConfigError([f"WEBHOOK_SECRET is not set (nor {ALLOW_INVOKE})"])
    return config


def _allows_invoke(environ: Mapping[str, str]) -> bool:
    return environ.get(ALLOW_INVOKE, "").strip().lower() in ("true", "yes", "1")


def _parse(event: Any, config: Config) -> _Request:
    """Return the work that an event requests.

    Raises:
        _RequestRejected: the event is not authorised, or malformed.
    """
    method = _method(event)
    if method is None:
        if not _allows_invoke(os.environ):
            reason = f"only signed webhooks are accepted; {ALLOW_INVOKE}=true allows invocations"
            raise _RequestRejected(403, reason)
        return _Request(EVERYTHING)
    if method != "POST":
        raise _RequestRejected(405, "a webhook is a POST")
    signature = _signature(event)
    body = _body(event)
    if not webhook.is_signed(body, signature, config.webhook.secrets):
        raise _RequestRejected(401, "the signature in X-LD-Signature is missing or wrong")
    try:
        notice = webhook.read(body)
    except InvalidData as e:
        raise _RequestRejected(400, str(e)) from e
    return _Request(notice, notice.id or signature)


def _method(event: Any) -> str | None:
    """Return the HTTP method of a request; None if the event is not HTTP (webhooks 12.4)."""
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
    text = event.get("body") or ""
    if not isinstance(text, str) or len(text) > 2 * webhook.MAX_BODY:
        raise _RequestRejected(413, "the body is too long")
    if not event.get("isBase64Encoded"):
        body = text.encode("utf-8", "surrogatepass")
    else:
        try:
            body = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as e:
            raise _RequestRejected(400, "the body is not the base64 that it claims to be") from e
    if len(body) > webhook.MAX_BODY:
        raise _RequestRejected(413, "the body is too long")
    return body


def _time_limit(context: Any) -> float:
    """Return the number of seconds for the work."""
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    return min(MAX_DURATION, remaining() / 1000 - RESERVE) if remaining else MAX_DURATION


def _synchronise(config: Config, notice: ChangeNotice, deadline: float) -> dict[str, SyncResult]:
    """Synchronise in a new event loop, so that nothing stays open between invocations."""
    import asyncio

    from relay.build.commands import sync_targets
    from relay.sync import SyncOptions, synchronise

    session, targets = sync_targets(config)
    affected = notice.affected(target.spec for target in targets)
    seconds = max(MIN_DURATION, deadline - clock.monotonic())

    def is_seen(name: str, payload: Payload, changes: SyncChanges) -> bool:
        return _is_seen(affected[name], payload, changes)

    is_versioned = any(each.version for resources in affected.values() for each in resources)
    recheck_after = RECHECK_AFTER if is_versioned else RECHECK_AFTER_UNVERSIONED
    if notice is EVERYTHING:
        recheck_after = ()  # no particular change is expected
    recheck_after = tuple(at for at in recheck_after if at <= seconds - RECHECK_MARGIN)
    options = SyncOptions(seconds, recheck_after=recheck_after, is_seen=is_seen)
    affected_targets = [target for target in targets if target.spec.name in affected]
    return asyncio.run(synchronise(affected_targets, session, options, _log_result))


def _is_seen(
    resources: tuple[ChangedResource, ...], payload: Payload, changes: SyncChanges
) -> bool:
    """Return whether upstream has the announced versions or, if there are none, any change."""
    from relay.model.item import Kind

    versions = {each.flag: each.version for each in resources if each.version}
    if not versions:
        return bool(changes)
    items = {flag: payload.all(Kind.FLAG).get(flag) for flag in versions}
    return all(item is not None and item.version >= versions[f] for f, item in items.items())


def _log_result(result: SyncResult) -> None:
    if result.problem:
        _log.error('"%s" is not up to date: %s', result.name, result.problem)
    else:
        _log.info('"%s" is up to date: %s', result.name, json.dumps(result.changes.counts()))


def _report(result: SyncResult) -> dict[str, Any]:
    if result.problem:
        return {"problem": "not up to date; the function's log tells why"}
    return {**result.changes.counts(), "items": result.items}


def _response(status: int, message: str, **members: Any) -> dict[str, Any]:
    return {
        "statusCode": status,
        "headers": {"content-type": "application/json"},
        "body": json.dumps({"message": message, **members}),
    }
