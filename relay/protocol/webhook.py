"""LaunchDarkly's webhooks: signatures and announced changes (webhooks 12.1, 12.2). Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from relay.errors import InvalidData
from relay.model.credential import Secret
from relay.model.environment import EnvironmentSpec

MAX_BODY = 4 * 1024 * 1024
"""Maximum body size in bytes: a flag may be included twice, with the rules of all environments."""

MAX_RESOURCES = 1000
"""Maximum number of resources per body; with more, everything counts as changed."""

LONGEST_ID = 256
"""Maximum number of characters of an `_id`; LaunchDarkly's have 24."""

LAST_VERSION = 2**53
"""Limit below which integers are exact in JSON."""

ANY = "*"
"""Wildcard that matches every project, environment or flag."""


@dataclass(frozen=True, slots=True)
class ChangedResource:
    """A changed resource.

    Args:
        project: project key, or `ANY`.
        environment: environment key, or `ANY`.
        flag: flag key; empty for segments and all other resources.
        version: minimum version of the flag in the environment; None if the body does not state it.
    """

    project: str
    environment: str
    flag: str = ""
    version: int | None = None

    def may_be_in(self, spec: EnvironmentSpec) -> bool:
        """Return whether the resource may belong to `spec`, whose keys may be unknown."""
        return _matches(self.project, spec.project_key) and _matches(
            self.environment, spec.environment_key
        )


@dataclass(frozen=True, slots=True)
class ChangeNotice:
    """Content of a webhook body.

    Args:
        id: id of the audit log entry; empty if there is none.
        resources: changed resources, without duplicates; empty if anything may have changed.
    """

    id: str
    resources: tuple[ChangedResource, ...] = ()

    def affected(self, specs: Iterable[EnvironmentSpec]) -> dict[str, tuple[ChangedResource, ...]]:
        """Return the environments to check, each with the changes to expect.

        If no resource belongs to any of them, the change may concern all (webhooks 12.2): then all
        are returned, without specific changes.
        """
        names = {spec.name: spec for spec in specs}
        by_name = {name: self._resources_in(spec) for name, spec in names.items()}
        concerned = {name: resources for name, resources in by_name.items() if resources}
        return concerned or dict.fromkeys(names, ())

    def _resources_in(self, spec: EnvironmentSpec) -> tuple[ChangedResource, ...]:
        resources = (resource for resource in self.resources if resource.may_be_in(spec))
        if spec.payload_filter:
            # The filter may hold back the flag, so that its version is no use to wait for.
            resources = (replace(resource, version=None) for resource in resources)
        return tuple(dict.fromkeys(resources))


EVERYTHING = ChangeNotice("")
"""Anything may have changed."""


def is_signed(body: bytes, signature: str, secrets: Sequence[Secret]) -> bool:
    """Return whether a body was signed with one of the secrets, in constant time.

    Args:
        body: raw body.
        signature: value of `X-LD-Signature`, lower-case hexadecimal; empty if there was none.
        secrets: accepted secrets.
    """
    given_digest = signature.encode("utf-8", "replace")
    matches = [hmac.compare_digest(given_digest, sign(body, secret).encode()) for secret in secrets]
    return any(matches)


def sign(body: bytes, secret: Secret) -> str:
    """Return the signature of a body."""
    return hmac.new(secret.reveal().encode(), body, hashlib.sha256).hexdigest()


def read(body: bytes) -> ChangeNotice:
    """Parse the body of a webhook.

    Raises:
        InvalidData: the body is not an audit log entry.
    """
    try:
        entry = _ENTRY_DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidData("body of a webhook", str(e)) from e
    if len(entry.id) > LONGEST_ID:
        raise InvalidData("body of a webhook", f"its _id is longer than {LONGEST_ID} characters")
    names = [access.resource for access in entry.accesses or ()]
    names += (entry.target.resources or ()) if entry.target else ()
    if len(names) > MAX_RESOURCES:
        return ChangeNotice(entry.id)
    resources = [_parse_resource(name, entry) for name in dict.fromkeys(names)]
    if None in resources:
        return ChangeNotice(entry.id)
    return ChangeNotice(
        entry.id, tuple(dict.fromkeys(resource for resource in resources if resource))
    )


class _Access(msgspec.Struct, frozen=True):
    resource: str = ""


class _Target(msgspec.Struct, frozen=True):
    resources: list[str] | None = None


class _Entry(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="_id", default="")
    kind: str = ""
    accesses: list[_Access] | None = None
    target: _Target | None = None
    current: Any = msgspec.field(name="currentVersion", default=None)


_ENTRY_DECODER = msgspec.json.Decoder(_Entry)


def _parse_resource(resource: str, entry: _Entry) -> ChangedResource | None:
    """Parse a resource such as `proj/KEY:env/KEY:flag/KEY;tag`; return None if it is unclear."""
    keys = dict(_split_resource(resource))
    project = keys.get("proj")
    if not project:
        return None
    environment, flag = keys.get("env", ANY), keys.get("flag", "")
    if ANY in flag:
        flag = ""
    version = _version(entry, environment, flag) if entry.kind in ("flag", "") and flag else None
    return ChangedResource(project, environment, flag, version)


def _split_resource(resource: str) -> Iterator[tuple[str, str]]:
    for part in resource.split(":"):
        kind, _, key = part.partition("/")
        yield kind, key.partition(";")[0]


def _version(entry: _Entry, environment: str, flag: str) -> int | None:
    """Return the version of a flag in an environment; None if the body does not include it."""
    if _get(entry.current, "key") not in (None, flag):
        return None
    version = _get(_get(_get(entry.current, "environments"), environment), "version")
    # `type`, because `True` is an int, too.
    return version if type(version) is int and 0 < version < LAST_VERSION else None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _matches(pattern: str, key: str) -> bool:
    """Return whether `key` matches a pattern with wildcards; an unknown key matches all."""
    if not key or pattern == key:
        return True
    first, *rest = pattern.split(ANY)
    return bool(rest) and key.startswith(first) and key.endswith(rest[-1])
