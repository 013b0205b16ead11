"""`/status` in ld-relay's form (status 8.1), and health checks for orchestrators.

An outage of LaunchDarkly shows in `/status`, but never makes a relay with data unready.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice

from relay import __version__, clock
from relay.environment import ConnectionState, Environment
from relay.model.answers import AnswerCounts
from relay.model.credential import Credential, CredentialKind
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem
from relay.relay import Directory, Relay
from relay.stores import StoreState, StoreStatus, statuses_of
from relay.telemetry.traffic import RequestMetrics, totals
from relay.web.responses import PreparedResponse, json

MAX_INVALID = 20
"""Invalid items that are listed, for each environment and database, and invalid entries of the list
of environments; their count is complete."""

MAX_REASON = 200
"""Characters of the reason for which an item or entry is invalid."""


def overview(relay: Relay, traffic: RequestMetrics) -> PreparedResponse:
    """Return `/status`; the health is in the body, the status code is always 200."""
    counts = _counts(traffic)
    environments = {
        name: _environment_members(relay, traffic, environment, counts)
        for name, environment in relay.environments.items()
    }
    for name, reason in relay.unusable.items():
        environments.setdefault(name, _unusable_members(reason))
    healthy = (
        relay.knows_environments
        and not relay.unusable
        and all(_is_healthy(relay, environment) for environment in relay.environments.values())
    )
    directory = relay.auto_configuration
    body = {
        "environments": dict(sorted(environments.items())),
        "status": "healthy" if healthy else "degraded",
        "version": __version__,
        "clientVersion": __version__,
        **({"autoConfigStatus": _directory_members(relay, directory)} if directory else {}),
        **_archive_members(relay),
        **_workers_members(relay),
    }
    return json(200, body)


def one(relay: Relay, traffic: RequestMetrics, identifier: str) -> PreparedResponse:
    """Return the part of `/status` for one environment (newer 10.3).

    Args:
        relay: provides the environments.
        traffic: request counts.
        identifier: name, client-side ID, both display names, or project and environment key as
            `PROJECT/ENVIRONMENT`; each followed by `/filters/KEY` for the variant with a filter.
    """
    environment = _find(relay, identifier)
    if environment is None and identifier in relay.unusable:
        return json(200, _unusable_members(relay.unusable[identifier]))
    if environment is None and not relay.knows_environments:
        return json(503, {"error": "the list of environments is not known yet"})
    if environment is None:
        return json(404, {"error": "there is no environment with this name or client-side ID"})
    return json(200, _environment_members(relay, traffic, environment, _counts(traffic)))


def _unusable_members(reason: str) -> dict[str, object]:
    return {"status": "disconnected", "unusable": reason[:MAX_REASON]}


def _find(relay: Relay, identifier: str) -> Environment | None:
    find = relay.registry.find
    environment = relay.environments.get(identifier)
    environment = environment or find(CredentialKind.ENVIRONMENT_ID, identifier)
    if environment is not None:
        return environment
    owner, _, payload_filter = identifier.partition("/filters/")
    if payload_filter:
        environment = _find(relay, owner)
        key = environment and environment.spec.sdk_key
        return find(key.kind, key.value, payload_filter) if key else None
    named = (
        each
        for each in relay.environments.values()
        if identifier in (_keys(each.spec), each.spec.title)
    )
    return next(named, None)


def _keys(spec: EnvironmentSpec) -> str | None:
    """Return project and environment key in one; None for variants, and if one is unknown."""
    known = spec.project_key and spec.environment_key and not spec.payload_filter
    return f"{spec.project_key}/{spec.environment_key}" if known else None


def _is_healthy(relay: Relay, environment: Environment) -> bool:
    """Return whether an environment is connected, and its big segments recent if that counts."""
    if not _is_connected(relay, environment):
        return False
    big_segments = environment.big_segments if relay.stale_big_segments_degrade else None
    status = big_segments.status if big_segments else None
    return status is None or not status.potentially_stale


def _is_connected(relay: Relay, environment: Environment) -> bool:
    """Return whether upstream has delivered data, and has not been lost for long."""
    connection = environment.connection
    valid = connection.state is ConnectionState.VALID
    recent = connection.lasts < relay.disconnected_after
    return connection.has_data and (valid or recent)


Counts = Mapping[str, Mapping[str, int]]
"""Counts by member of `/status`, then by environment."""


def _counts(traffic: RequestMetrics) -> Counts:
    return {"requests": totals(traffic.requests), "newStreams": totals(traffic.new_streams)}


def _environment_members(
    relay: Relay, traffic: RequestMetrics, environment: Environment, counts: Counts
) -> dict[str, object]:
    """Return the members of an environment: those of ld-relay in its order, then our own."""
    spec, payload = environment.spec, environment.payload
    age = environment.connection.data_age
    members = {
        "sdkKey": spec.sdk_key.obscured,
        "envId": spec.environment_id.value if spec.environment_id else None,
        **_names(spec),
        "mobileKey": spec.mobile_key.obscured if spec.mobile_key else None,
        **_further_credentials(spec),
        "status": "connected" if _is_connected(relay, environment) else "disconnected",
        "connectionStatus": _connection_members(environment),
        "dataStoreStatus": _store_members(relay, environment),
        "upstream": _upstream_members(environment),
        "dataStores": _all_stores_members(environment),
        "bigSegmentStatus": _big_segment_members(environment),
        "published": _published_members(environment),
        "fleet": _fleet_members(environment),
        "dataAge": None if age is None else round(age),
        "items": None if payload is None else len(payload),
        **_invalid_members(environment.invalid.values()),
        "rejected": environment.rejected or None,
        "streams": len(environment.hub),
        "fdv2": _fdv2_members(environment),
        **{member: sums.get(spec.name, 0) for member, sums in counts.items()},
        "events": _events_members(relay, traffic, spec.name),
    }
    return _without_none(members)


def _fleet_members(environment: Environment) -> Mapping[str, object] | None:
    """Return who leads the fleet, and the part that this relay has in it; None without one."""
    if environment.fleet is None:
        return None
    status = environment.fleet.status
    return _without_none(
        {
            "role": status.role.value,
            "leader": status.leader,
            "term": status.term,
            "behind": status.behind or None,
        }
    )


def _names(spec: EnvironmentSpec) -> Mapping[str, object]:
    """Return the names that LaunchDarkly has told."""
    if spec.title == spec.name:
        return {}
    return {
        "envKey": spec.environment_key or None,
        "envName": spec.environment_name or None,
        "projKey": spec.project_key or None,
        "projName": spec.project_name or None,
    }


def _further_credentials(spec: EnvironmentSpec) -> Mapping[str, object]:
    """Return the credentials that expire, and all keys if there are several of a kind."""
    kinds = (("sdkKeys", CredentialKind.SDK_KEY), ("mobileKeys", CredentialKind.MOBILE_KEY))
    now = clock.now()
    members: dict[str, object] = {}
    for member, kind in kinds:
        keys = {
            key: expires_at
            for key, expires_at in spec.credentials.items()
            if key.kind is kind and expires_at > now
        }
        if kind is CredentialKind.SDK_KEY:
            expiring = [key for key, expires_at in keys.items() if expires_at < math.inf]
            members["expiringSdkKey"] = expiring[-1].obscured if expiring else None
        if len(keys) > 1:
            members[member] = [_key_members(*each) for each in keys.items()]
    return members


def _key_members(key: Credential, expires_at: float) -> Mapping[str, object]:
    expiry = _ms(expires_at) if expires_at < math.inf else None
    return _without_none({"value": key.obscured, "expiry": expiry})


def _directory_members(relay: Relay, directory: Directory) -> Mapping[str, object]:
    """Return the state of the list of environments (newer-versions 10.3)."""
    connection = directory.connection
    age = connection.data_age
    members: dict[str, object] = {
        "state": connection.state.value,
        "stateSince": _ms(connection.since),
    }
    if connection.last_error:
        kind, at = connection.last_error
        error = {"kind": kind.value, "statusCode": connection.last_status, "time": _ms(at)}
        members["lastError"] = _without_none(error)
    if age is not None:
        members["dataAge"] = round(age)
        members["lastConfirmed"] = _ms(clock.unix() - age)
    if relay.environments and not relay.knows_environments:
        members["stored"] = True
    if invalid := directory.invalid_entries:
        members["invalidEntryCount"] = len(invalid)
        members["invalidEntries"] = {
            f"{kind} {identifier}": reason[:MAX_REASON]
            for (kind, identifier), reason in islice(invalid.items(), MAX_INVALID)
        }
    return members


def _archive_members(relay: Relay) -> Mapping[str, object]:
    """Return why the newest state of an archive is not served, if so."""
    if relay.unusable_archive is None:
        return {}
    reason, at = relay.unusable_archive
    return {"archiveStatus": {"unusable": reason[:MAX_REASON], "time": _ms(at)}}


def _workers_members(relay: Relay) -> Mapping[str, object]:
    """Return the state of the workers, if this is their feeder."""
    if not relay.workers:
        return {}
    workers = [
        _without_none(
            {
                "number": each.number,
                "state": "VALID" if each.connected else "INTERRUPTED",
                "pid": each.process,
                "since": _ms(each.since),
                "restarts": each.starts - 1,
                "streams": each.streams,
            }
        )
        for _, each in sorted(relay.workers.items())
    ]
    return {"workers": workers}


def _events_members(relay: Relay, traffic: RequestMetrics, name: str) -> dict[str, object] | None:
    """Return the state of events of an environment; None if there is nothing to report."""
    if relay.events is None:
        discarded = traffic.discarded[name]
        return {"discarded": discarded} if discarded else None
    oldest = relay.events.oldest(name)
    age = None if oldest is None else max(0, round(clock.now() - oldest))
    members = {**asdict(relay.events.counts(name)), "oldestAge": age}
    durable = relay.events.spool.durable
    return {"kept": "on disk" if durable else "in memory", **_without_none(members)}


def _fdv2_members(environment: Environment) -> dict[str, object] | None:
    """Return what SDKs of FDv2 were answered; None if there were none."""
    journal = environment.journal
    server, client = map(_answers_members, environment.answers.values())
    if not (server or client):
        return None
    members = {"states": journal.depth, "barriers": journal.barriers, "clientSide": client}
    return _without_none({**(server or {}), **members})


def _answers_members(counts: AnswerCounts) -> dict[str, object] | None:
    answers: dict[str, dict[str, int]] = {}
    for (kind, reason), number in sorted(counts.numbers.items()):
        answers.setdefault(kind, {})[reason] = number.value
    return {"answers": answers, "bytesSaved": counts.saved.value} if answers else None


def _without_none(members: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in members.items() if value is not None}


def _connection_members(environment: Environment) -> dict[str, object]:
    connection = environment.connection
    members: dict[str, object] = {
        "state": connection.state.value,
        "stateSince": _ms(connection.since),
    }
    if connection.last_error:
        kind, at = connection.last_error
        members["lastError"] = {"kind": kind.value, "time": _ms(at)}
    return members


def _upstream_members(environment: Environment) -> dict[str, object] | None:
    """Return how upstream is followed, and its name of the data; None without upstream."""
    if not environment.protocol:
        return None
    selector = environment.journal.upstream or None
    return _without_none({"protocol": environment.protocol, "selector": selector})


def _store_members(relay: Relay, environment: Environment) -> dict[str, object]:
    for status in statuses_of(environment.mirrors):
        return _database_members(status)
    # Without a database ld-relay reports on its memory, which is valid as soon as upstream has
    # responded or `initTimeout` is over.
    if relay.starting and not environment.init_done.is_set():
        return {"state": StoreState.INITIALIZING.value, "stateSince": 0}
    return {"state": StoreState.VALID.value, "stateSince": _ms(environment.created)}


def _all_stores_members(environment: Environment) -> list[dict[str, object]] | None:
    """Return the state of each database; None if there is one at most."""
    members = list(map(_database_members, statuses_of(environment.mirrors)))
    return members if len(members) > 1 else None


def _big_segment_members(environment: Environment) -> dict[str, object] | None:
    """Return the state of big segments; None if there are none, or no database has them."""
    status = environment.big_segments.status if environment.big_segments else None
    if status is None:
        return None
    return {
        "available": status.available,
        "potentiallyStale": status.potentially_stale,
        "lastSynchronizedOn": _ms(status.synchronized_at or 0),
    }


def _published_members(environment: Environment) -> list[dict[str, object]] | None:
    """Return the state of each published document; None if nothing is published."""
    members: list[dict[str, object]] = [
        {
            "state": status.state.value,
            "stateSince": _ms(status.since),
            "document": status.prefix,
            "url": status.server,
        }
        for status in statuses_of(environment.mirrors, documents=True)
    ]
    return members or None


def _database_members(status: StoreStatus) -> dict[str, object]:
    return {
        "state": status.state.value,
        "stateSince": _ms(status.since),
        "database": status.database,
        **({"dbServer": status.server} if status.server else {}),
        **({"dbPrefix": status.prefix} if status.prefix else {}),
        **({"dbTable": status.table} if status.table else {}),
        **_invalid_members(status.invalid),
    }


def _invalid_members(items: Iterable[InvalidItem]) -> Mapping[str, object]:
    items = list(items)
    if not items:
        return {}
    reasons = {f"{i.kind.noun} {i.key}": i.reason[:MAX_REASON] for i in islice(items, MAX_INVALID)}
    return {"invalidItemCount": len(items), "invalidItems": reasons}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def live() -> PreparedResponse:
    """Return `/livez`: 200 while the process responds."""
    return json(200, {"status": "alive"})


def started(relay: Relay) -> PreparedResponse:
    """Return `/startupz`: 503 until each environment has data or `initTimeout` is over."""
    if _is_starting(relay):
        return _health(503, "starting", relay.environments.values())
    return _health(200, "started", relay.environments.values())


def ready(relay: Relay) -> PreparedResponse:
    """Return `/readyz`: 200 if at least one environment can be served, however old its data."""
    environments = relay.environments.values()
    if relay.stopping:
        return _health(503, "stopping", environments)
    if _is_starting(relay):
        return _health(503, "starting", environments)
    if relay.lacks_environments:
        return _health(503, "the list of environments is not known", environments)
    if environments and all(environment.payload is None for environment in environments):
        return _health(503, "no environment has data", environments)
    return _health(200, "ready", environments)


def environment_ready(relay: Relay, name: str) -> PreparedResponse:
    """Return `/readyz/{environment}`: 200 if this environment can be served."""
    environment = relay.environments.get(name)
    if environment is None:
        return json(404, {"status": "there is no environment with this name"})
    if relay.stopping:
        return _health(503, "stopping", [environment])
    if environment.payload is None:
        return _health(503, "starting" if relay.starting else "no data", [environment])
    return _health(200, "ready", [environment])


def _is_starting(relay: Relay) -> bool:
    lack_data = any(environment.payload is None for environment in relay.environments.values())
    return relay.starting and (lack_data or relay.lacks_environments)


def _health(status: int, word: str, environments: Iterable[Environment]) -> PreparedResponse:
    unavailable = {e.spec.name: _unavailable_reason(e) for e in environments if e.payload is None}
    return json(status, {"status": word, **({"unavailable": unavailable} if unavailable else {})})


def _unavailable_reason(environment: Environment) -> str:
    """Return the reason for which an environment has no data."""
    if environment.connection.state is ConnectionState.OFF:
        return "LaunchDarkly refuses the SDK key"
    return "no data yet"
