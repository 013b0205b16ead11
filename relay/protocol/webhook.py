"""LaunchDarkly's webhooks: who signed, and what a body announces (webhooks 12.1, 12.2). Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from relay.errors import InvalidData
from relay.model.credential import Secret
from relay.model.environment import EnvironmentSpec

MAX_BODY = 4 * 1024 * 1024
"""Bytes of a body: it may hold a flag twice, with the settings and rules of all environments."""

MAX_RESOURCES = 1000
"""Resources of one body that are looked at: of more, everything is taken as changed."""

LONGEST_ID = 256
"""Characters of an `_id` that are taken as they are; LaunchDarkly's have 24."""

LAST_VERSION = 2**53
"""Versions are exact integers in JSON up to this."""

ANY = "*"
"""In the place of a key: each project, environment or flag."""


@dataclass(frozen=True, slots=True)
class ChangedResource:
    """Something that has changed.

    Args:
        project: its key, or `ANY`.
        environment: its key within the project, or `ANY`.
        flag: its key; empty for a segment and for everything else.
        version: that the flag has in the environment now, at least; None if the body does not say.
    """

    project: str
    environment: str
    flag: str = ""
    version: int | None = None

    def may_be_in(self, spec: EnvironmentSpec) -> bool:
        """Whether this may concern an environment, of which perhaps not all keys are known."""
        return _fits(self.project, spec.project_key) and _fits(
            self.environment, spec.environment_key
        )


@dataclass(frozen=True, slots=True)
class ChangeNotice:
    """What a body says.

    Args:
        id: of the entry in the audit log; empty if there is none.
        resources: what has changed, without repetitions; empty for "anything".
    """

    id: str
    resources: tuple[ChangedResource, ...] = ()

    def concerning(
        self, specs: Iterable[EnvironmentSpec]
    ) -> dict[str, tuple[ChangedResource, ...]]:
        """Return the environments that should be looked at, and what should be seen in each.

        What belongs to none of them may be a change of any (webhooks 12.2): then it is all of
        them, with nothing in particular to be seen.
        """
        names = {spec.name: spec for spec in specs}
        found = {name: self._places_in(spec) for name, spec in names.items()}
        concerned = {name: places for name, places in found.items() if places}
        return concerned or dict.fromkeys(names, ())

    def _places_in(self, spec: EnvironmentSpec) -> tuple[ChangedResource, ...]:
        return tuple(place for place in self.resources if place.may_be_in(spec))


EVERYTHING = ChangeNotice("")
"""Anything may have changed."""


def is_signed(body: bytes, signature: str, secrets: Sequence[Secret]) -> bool:
    """Whether a signature is that of a body, made with one of the secrets.

    It takes the same time whichever of them it is, and however much of the signature is right.

    Args:
        body: as it came.
        signature: `X-LD-Signature`, lower-case hexadecimal; empty if there was none.
        secrets: those that may have been used.
    """
    given = signature.encode("utf-8", "replace")
    matches = [hmac.compare_digest(given, sign(body, secret).encode()) for secret in secrets]
    return any(matches)


def sign(body: bytes, secret: Secret) -> str:
    """Return the signature of a body."""
    return hmac.new(secret.reveal().encode(), body, hashlib.sha256).hexdigest()


def read(body: bytes) -> ChangeNotice:
    """Return what a body announces.

    Raises:
        InvalidData: it is no audit log entry.
    """
    try:
        entry = _ENTRIES.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidData("body of a webhook", str(e)) from e
    if len(entry.id) > LONGEST_ID:
        raise InvalidData("body of a webhook", f"its _id is longer than {LONGEST_ID} characters")
    resources = [access.resource for access in entry.accesses or ()]
    resources += (entry.target.resources or ()) if entry.target else ()
    if len(resources) > MAX_RESOURCES:
        return ChangeNotice(entry.id)
    places = [_place(resource, entry) for resource in dict.fromkeys(resources)]
    if None in places:
        return ChangeNotice(entry.id)
    return ChangeNotice(entry.id, tuple(dict.fromkeys(place for place in places if place)))


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


_ENTRIES = msgspec.json.Decoder(_Entry)


def _place(resource: str, entry: _Entry) -> ChangedResource | None:
    """Return what a resource such as `proj/KEY:env/KEY:flag/KEY;tag` names; None if unclear."""
    keys = dict(_parts(resource))
    project = keys.get("proj")
    if not project:
        return None
    environment, flag = keys.get("env", ANY), keys.get("flag", "")
    if ANY in flag:
        flag = ""
    version = _version(entry, environment, flag) if entry.kind in ("flag", "") and flag else None
    return ChangedResource(project, environment, flag, version)


def _parts(resource: str) -> Iterator[tuple[str, str]]:
    for part in resource.split(":"):
        kind, _, key = part.partition("/")
        yield kind, key.partition(";")[0]


def _version(entry: _Entry, environment: str, flag: str) -> int | None:
    """Return the version of a flag in an environment, where the body includes it."""
    if _member(entry.current, "key") not in (None, flag):
        return None
    version = _member(_member(_member(entry.current, "environments"), environment), "version")
    # `True` is an int, too.
    return version if type(version) is int and 0 < version < LAST_VERSION else None


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _fits(given: str, known: str) -> bool:
    """Whether a key of a resource, maybe with wildcards, can be that of an environment."""
    if not known or given == known:
        return True
    first, *rest = given.split(ANY)
    return bool(rest) and known.startswith(first) and known.endswith(rest[-1])
