"""LaunchDarkly's descriptions of environments, and the specs that follow from them. Pure.

The form is that of offline-and-autoconfig 7.1, the rotation of keys that of 7.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from relay.errors import InvalidData
from relay.model.credential import Credential, EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec

LATEST = 253_402_300_799.0
"""End of the year 9999 in Unix seconds: later times stand for it, as no clock can show them."""

LONGEST_TTL = 365 * 24 * 60
"""Maximum number of minutes for which clients may cache responses: a year."""

Members = Mapping[str, Any]
"""Members of a JSON object, by name in lower case: names match in any letter case."""


class EnvironmentDescription(Struct, frozen=True):
    """Description of an environment, without the settings that this relay adds.

    Args:
        id: ID of the environment, which is also the credential of client-side SDKs.
        version: grows with each change.
        key: key of the environment within its project.
        name: name of the environment.
        project_key: key of the project.
        project_name: name of the project.
        sdk_key: primary SDK key; empty leaves it as it is.
        expiring: an earlier SDK key and the Unix time at which it expires; None without one.
        sdk_keys: all SDK keys, each with the Unix time at which it expires; empty if they are not
            listed, so that `sdk_key` and `expiring` are all.
        mobile_key: primary mobile key; empty leaves it as it is.
        mobile_keys: all mobile keys, as `sdk_keys`.
        ttl: seconds for which clients may cache polling responses.
        secure_mode: require a hash of the context.
    """

    id: str
    version: int
    key: str = ""
    name: str = ""
    project_key: str = ""
    project_name: str = ""
    sdk_key: str = ""
    expiring: tuple[str, float] | None = None
    sdk_keys: tuple[tuple[str, float], ...] = ()
    mobile_key: str = ""
    mobile_keys: tuple[tuple[str, float], ...] = ()
    ttl: float = 0.0
    secure_mode: bool = False

    def __repr__(self) -> str:
        return f"<EnvironmentDescription {self.id} version {self.version}>"  # no keys


class SharedSettings(Struct, frozen=True):
    """Settings of this relay for all environments that LaunchDarkly describes.

    Args:
        prefix: prefix of the keys in the database; `$CID` stands for the environment's ID.
        allowed_origins: allowed CORS origins; empty allows every origin.
        allowed_headers: allowed CORS request headers besides the standard ones.
        eval_streams: send evaluated flags instead of pings on client-side streams.
        table: table of the database; `$CID` stands for the environment's ID.
    """

    prefix: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_headers: tuple[str, ...] = ()
    eval_streams: bool = False
    table: str = ""


def decoded(what: str, content: bytes) -> object:
    """Decode JSON.

    Raises:
        InvalidData: it is malformed.
    """
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as e:
        raise InvalidData(what, str(e)) from e


def members_of(what: str, value: object) -> Members:
    """Return the members of a JSON object by name in lower case; of two names, the last counts.

    Raises:
        InvalidData: it is no object.
    """
    if not isinstance(value, dict):
        raise InvalidData(what, "not a JSON object")
    return {name.lower(): member for name, member in value.items()}


def text_in(what: str, members: Members, name: str) -> str:
    """Return a text; empty if it is missing or null.

    Raises:
        InvalidData: the member has another type.
    """
    return _member(what, members, name, str, "a string") or ""


def integer_in(what: str, members: Members, name: str) -> int:
    """Return an integer; 0 if it is missing or null.

    Raises:
        InvalidData: the member has another type, or is a fraction.
    """
    return _member(what, members, name, int, "an integer") or 0


def describe(value: object) -> EnvironmentDescription:
    """Return the description of an environment that a decoded JSON value is.

    Raises:
        InvalidData: a member has a wrong type; the text contains no keys.
    """
    members = members_of("environment", value)
    environment_id = text_in("environment", members, "envid")
    what = f'environment "{environment_id}"'
    sdk_key = _optional_object(what, members, "sdkkey")
    expiring = _optional_object(what, sdk_key, "expiring")
    old_key = text_in(what, expiring, "value")
    return EnvironmentDescription(
        id=environment_id,
        version=integer_in(what, members, "version"),
        key=text_in(what, members, "envkey"),
        name=text_in(what, members, "envname"),
        project_key=text_in(what, members, "projkey"),
        project_name=text_in(what, members, "projname"),
        sdk_key=text_in(what, sdk_key, "value"),
        expiring=(old_key, _time_in(what, expiring, "timestamp")) if old_key else None,
        sdk_keys=_keys(what, members, "sdkkeys"),
        mobile_key=text_in(what, members, "mobkey"),
        mobile_keys=_keys(what, members, "mobilekeys"),
        ttl=60.0 * min(max(0, integer_in(what, members, "defaultttl")), LONGEST_TTL),
        secure_mode=_member(what, members, "securemode", bool, "true or false") or False,
    )


def represent(description: EnvironmentDescription) -> dict[str, object]:
    """Return the JSON value that `describe` reads, for programs that keep descriptions."""
    sdk_key: dict[str, object] = {"value": description.sdk_key}
    if description.expiring is not None:
        old_key, expires_at = description.expiring
        sdk_key["expiring"] = {"value": old_key, "timestamp": _milliseconds(expires_at)}
    members = {
        "envID": description.id,
        "envKey": description.key,
        "envName": description.name,
        "mobKey": description.mobile_key,
        "projKey": description.project_key,
        "projName": description.project_name,
        "sdkKey": sdk_key,
        "defaultTtl": round(description.ttl / 60),
        "secureMode": description.secure_mode,
        "version": description.version,
    }
    lists = {"sdkKeys": description.sdk_keys, "mobileKeys": description.mobile_keys}
    return members | {name: _represent_keys(keys) for name, keys in lists.items() if keys}


def settled(description: EnvironmentDescription, spec: EnvironmentSpec) -> EnvironmentDescription:
    """Return the description from which a spec follows without its history.

    Empty keys stand for those that an environment had, and earlier keys last as long as they were
    told to: after a restart nothing but the description says so.

    Args:
        description: the latest one.
        spec: what has become of it.
    """
    sdk_key, mobile_key = spec.sdk_key, spec.mobile_key
    result = replace(
        description, sdk_key=sdk_key.value, mobile_key=mobile_key.value if mobile_key else ""
    )
    if description.sdk_keys:
        return result
    expiring = [(key.value, at) for key, at in spec.expiries if isinstance(key, SDKKey)]
    if len(expiring) > 1:
        every = ((sdk_key.value, math.inf), *expiring)
        return replace(result, expiring=None, sdk_keys=every)
    return replace(result, expiring=expiring[0] if expiring else None)


def variant_name(environment_id: str, payload_filter: str) -> str:
    """Return the name of an environment, or of its variant with a payload filter."""
    return f"{environment_id}/{payload_filter}" if payload_filter else environment_id


def spec_of(
    description: EnvironmentDescription,
    settings: SharedSettings,
    now: float,
    before: EnvironmentSpec | None = None,
    payload_filter: str = "",
) -> EnvironmentSpec:
    """Return the spec that follows from a description.

    Args:
        description: of the environment.
        settings: of this relay.
        now: Unix time.
        before: the spec so far, whose earlier SDK keys last as long as they were told to; None
            for a new environment.
        payload_filter: key of a payload filter, for the variant with that part of the data; empty
            for the environment itself.

    Raises:
        InvalidData: a new environment has no SDK key.
    """
    sdk_key = before.sdk_key if before else None
    if description.sdk_key:
        sdk_key = SDKKey(description.sdk_key)
    if sdk_key is None:
        raise InvalidData(f'environment "{description.id}"', "there is no SDK key")
    mobile_key = before.mobile_key if before else None
    if description.mobile_key:
        mobile_key = MobileKey(description.mobile_key)
    part = before.payload_filter if before else payload_filter
    return EnvironmentSpec(
        name=before.name if before else variant_name(description.id, payload_filter),
        sdk_key=sdk_key,
        mobile_key=mobile_key,
        environment_id=EnvironmentID(description.id),
        project_key=description.project_key,
        project_name=description.project_name,
        environment_key=description.key,
        environment_name=description.name,
        secure_mode=description.secure_mode,
        eval_streams=settings.eval_streams,
        ttl=description.ttl,
        allowed_origins=settings.allowed_origins,
        allowed_headers=settings.allowed_headers,
        prefix=settings.prefix.replace("$CID", ".".join(filter(None, (description.id, part)))),
        table=settings.table.replace("$CID", description.id),
        payload_filter=part,
        expiries=_expiries(description, sdk_key, mobile_key, now, before),
    )


def _expiries(
    description: EnvironmentDescription,
    sdk_key: SDKKey,
    mobile_key: MobileKey | None,
    now: float,
    before: EnvironmentSpec | None,
) -> tuple[tuple[Credential, float], ...]:
    """Return the further credentials of an environment, and limits of the primary ones."""
    further: dict[Credential, float] = {}
    if description.sdk_keys:
        further = {SDKKey(key): expires_at for key, expires_at in description.sdk_keys}
    else:
        if before is not None:
            further = {
                key: expires_at
                for key, expires_at in before.expiries
                if isinstance(key, SDKKey) and expires_at < math.inf
            }
        if description.expiring is not None:
            # LaunchDarkly goes on naming the last key that was given a grace period, which does
            # not begin anew.
            key, expires_at = description.expiring
            further.setdefault(SDKKey(key), expires_at)
        # A key that becomes primary again expires no more.
        further.pop(sdk_key, None)
    further |= {MobileKey(key): expires_at for key, expires_at in description.mobile_keys}
    # The primary keys are listed among all keys, and have no limit anyway.
    redundant = {(sdk_key, math.inf), (mobile_key, math.inf)}
    return tuple(pair for pair in further.items() if pair[1] > now and pair not in redundant)


def rotations(
    before: EnvironmentSpec, after: EnvironmentSpec, now: float
) -> Sequence[tuple[Any, ...]]:
    """Return a log line for each key that a change has replaced, added, limited or revoked.

    Args:
        before: spec before the change.
        after: spec after it.
        now: Unix time.

    Returns:
        Texts with their arguments, as loggers take them; keys are masked, times Unix times.
    """
    lines: list[tuple[Any, ...]] = []
    if after.sdk_key != before.sdk_key:
        lines.append(("New primary SDK key is %s", after.sdk_key.masked))
    if after.mobile_key != before.mobile_key and after.mobile_key and before.mobile_key:
        text = "Mobile key %s was rotated, new primary mobile key is %s"
        lines.append((text, before.mobile_key.masked, after.mobile_key.masked))
    old, new = before.credentials, after.credentials
    for credential, expires_at in new.items():
        known = credential in old
        if not known and credential not in (after.sdk_key, after.mobile_key):
            text = "%s %s was not previously managed by Relay; it is accepted, too"
            lines.append((text, _noun(credential), credential.masked))
        if expires_at < math.inf and old.get(credential) != expires_at:
            text = "%s %s was marked for deprecation with an expiry at %s"
            lines.append((text, _noun(credential), credential.masked, expires_at))
    for credential, expires_at in old.items():
        is_told = after.mobile_key is not None and credential == before.mobile_key  # above
        if credential not in new and expires_at > now and not is_told:
            text = "%s %s has been immediately revoked"
            lines.append((text, _noun(credential), credential.masked))
    return lines


def ignored_expiry(
    description: EnvironmentDescription, before: EnvironmentSpec | None, now: float
) -> tuple[Any, ...] | None:
    """Return a log line if the expiry in a description has no effect; None if it has.

    Args:
        description: of the environment.
        before: spec before the change; None for a new environment.
        now: Unix time.
    """
    if description.expiring is None or description.sdk_keys:
        return None
    key, expires_at = SDKKey(description.expiring[0]), description.expiring[1]
    known = before.credentials.get(key, math.inf) if before else math.inf
    if now < known < math.inf and known != expires_at:
        text = (
            "SDK key %s was marked for deprecation with an expiry at %s, but it was previously"
            " deprecated with an expiry at %s. The previous expiry will be used."
        )
        return text, key.masked, expires_at, known
    if expires_at <= now and known == math.inf:
        return "Deprecated SDK key %s already expired at %s; ignoring", key.masked, expires_at
    return None


def _noun(credential: Credential) -> str:
    noun = credential.kind.value
    return noun[0].upper() + noun[1:]


def _keys(what: str, members: Members, name: str) -> tuple[tuple[str, float], ...]:
    """Return a list of keys with their expiry; empty if it is missing."""
    keys = []
    for each in _member(what, members, name, list, "an array") or ():
        entry = members_of(f"{what}, {name}", each)
        key, expiry = text_in(what, entry, "value"), _time_in(what, entry, "expiry")
        if key:
            keys.append((key, expiry or math.inf))
    return tuple(keys)


def _represent_keys(keys: tuple[tuple[str, float], ...]) -> list[dict[str, object]]:
    return [
        {"value": key, **({} if expires_at == math.inf else {"expiry": _milliseconds(expires_at)})}
        for key, expires_at in keys
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _time_in(what: str, members: Members, name: str) -> float:
    """Return a time, which is given in Unix milliseconds, in Unix seconds; 0 if it is missing."""
    return float(min(max(0, integer_in(what, members, name)), int(LATEST) * 1000)) / 1000


def _optional_object(what: str, members: Members, name: str) -> Members:
    value = members.get(name)
    return {} if value is None else members_of(f"{what}, {name}", value)


def _member(what: str, members: Members, name: str, kind: type, noun: str) -> Any:
    value = members.get(name)
    # `True` is an integer only in Python.
    if value is None or (isinstance(value, kind) and isinstance(value, bool) is (kind is bool)):
        return value
    raise InvalidData(what, f"{name} is not {noun}")
