"""Environments as LaunchDarkly describes them: in archives, and in automatic configuration.

(offline-and-autoconfig 7.1, 7.2)
"""

from __future__ import annotations

from dataclasses import replace
from email.utils import formatdate
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from relay.errors import InvalidData
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec

StructT = TypeVar("StructT", bound=Struct)

_MINUTE = 60.0
_MILLISECOND = 0.001


class ExpiringKey(Struct, frozen=True):
    """A former SDK key, which is accepted for a while.

    Args:
        value: the key; empty for none.
        timestamp: time of its expiry, in Unix milliseconds.
    """

    value: str = ""
    timestamp: int = 0

    @property
    def expires_at(self) -> float:
        """Unix time of the expiry."""
        return self.timestamp * _MILLISECOND


class SDKKeys(Struct, frozen=True):
    """The primary SDK key, and the one that it replaces."""

    value: str = ""
    expiring: ExpiringKey = ExpiringKey()


class Representation(Struct, frozen=True):
    """Description of an environment. What is missing is empty or 0."""

    environment_id: str = field(default="", name="envid")
    environment_key: str = field(default="", name="envkey")
    environment_name: str = field(default="", name="envname")
    mobile_key: str = field(default="", name="mobkey")
    project_key: str = field(default="", name="projkey")
    project_name: str = field(default="", name="projname")
    sdk_key: SDKKeys = field(default=SDKKeys(), name="sdkkey")
    default_ttl: int = field(default=0, name="defaultttl")
    """Minutes for which clients may cache polling responses."""
    secure_mode: bool = field(default=False, name="securemode")
    version: int = 0

    def __repr__(self) -> str:
        return f"<Representation of {self.environment_id!r}, version {self.version}>"


def parse(value: object, subject: str) -> Representation:
    """Return the representation in decoded JSON; names match in any letter case.

    Raises:
        InvalidData: a member has a wrong type, or there is no ID.
    """
    found = convert(value, Representation, subject)
    if not found.environment_id:
        raise InvalidData(subject, "it has no envID")
    return found


def convert(value: object, struct: type[StructT], subject: str) -> StructT:
    """Return decoded JSON as a Struct with names in lower case; null stands for the default.

    Raises:
        InvalidData: a member has a wrong type.
    """
    try:
        return msgspec.convert(folded(value), struct)
    except msgspec.MsgspecError as e:
        raise InvalidData(subject, str(e)) from e


def folded(value: object) -> Any:
    """Return decoded JSON with all names in lower case, and without null."""
    if not isinstance(value, dict):
        return value
    return {str(k).lower(): folded(v) for k, v in value.items() if v is not None}


def described(spec: EnvironmentSpec, given: Representation) -> EnvironmentSpec:
    """Return a spec with the names and settings of a representation; its keys stay."""
    return replace(
        spec,
        environment_id=EnvironmentID(given.environment_id),
        project_key=given.project_key,
        environment_key=given.environment_key,
        project_name=given.project_name,
        environment_name=given.environment_name,
        secure_mode=given.secure_mode,
        ttl=max(0.0, given.default_ttl * _MINUTE),
    )


def rotated(
    spec: EnvironmentSpec, given: Representation, now: float
) -> tuple[EnvironmentSpec, list[str]]:
    """Return a spec with the keys of a representation, and the log lines about them.

    A key that is not named any more is revoked, unless its expiry was named before. A primary key
    never expires. A key that is missing from the representation stays.

    Args:
        spec: the environment so far.
        given: its new representation.
        now: Unix time.
    """
    lines: list[str] = []
    primary = SDKKey(given.sdk_key.value) if given.sdk_key.value else spec.sdk_key
    mobile = MobileKey(given.mobile_key) if given.mobile_key else spec.mobile_key
    expiries = {k: at for k, at in spec.expiries if at > now and k != primary}
    if primary != spec.sdk_key:
        lines.append(f"New primary SDK key is {primary.masked}")
    expiring = given.sdk_key.expiring
    if expiring.value and expiring.value != primary.value:
        key, at = SDKKey(expiring.value), expiring.expires_at
        known = expiries.get(key)
        if known is not None:
            if known != at:
                lines.append(
                    f"SDK key {key.masked} was marked for deprecation with an expiry at"
                    f" {_time(at)}, but it was previously deprecated with an expiry at"
                    f" {_time(known)}. The previous expiry will be used."
                )
        elif at <= now:
            text = f"Deprecated SDK key {key.masked} already expired at {_time(at)}; ignoring"
            lines.append(text)
        else:
            expiries[key] = at
            if key != spec.sdk_key:
                text = f"Deprecated SDK key {key.masked} was not previously managed by Relay"
                lines.append(text)
            text = f"SDK key {key.masked} was marked for deprecation with an expiry at {_time(at)}"
            lines.append(text)
    if spec.sdk_key != primary and spec.sdk_key not in expiries:
        lines.append(f"SDK key {spec.sdk_key.masked} has been immediately revoked")
    if spec.mobile_key and mobile and mobile != spec.mobile_key:
        text = f"Mobile key {spec.mobile_key.masked} was rotated, new primary mobile key is"
        lines.append(f"{text} {mobile.masked}")
    after = replace(spec, sdk_key=primary, mobile_key=mobile, expiries=tuple(expiries.items()))
    return after, lines


def _time(seconds: float) -> str:
    """Return a Unix time for a log line."""
    try:
        return formatdate(seconds, usegmt=True)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"
