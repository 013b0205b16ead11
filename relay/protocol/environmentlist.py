"""LaunchDarkly's list of environments as relays keep it, entry by entry. Pure.

The form is ld-relay's (newer-versions 10.2), so that each finds what the other has stored. Entries
are encrypted one by one, in `relay.stores.sealing`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from relay.errors import InvalidData
from relay.protocol.autoconfig import FilterDescription, describe_filter, represent_filter
from relay.protocol.environments import EnvironmentDescription, decoded, describe, represent

FORMAT = 2
"""Number of the form that is written: with lists of keys."""

OLDEST_FORMAT = 1
"""Number of the oldest form that is read: without them."""

ENVIRONMENT, FILTER = "environment", "filter"

_PREFIXES = {ENVIRONMENT: "env:", FILTER: "filter:"}
"""By kind, how the name of an entry begins; the ID follows."""


class EnvironmentList(Struct, frozen=True):
    """Environments and payload filters, as LaunchDarkly named them at some time.

    Args:
        environments: by ID.
        filters: by ID.
        confirmed: Unix time at which LaunchDarkly last confirmed the list; None if unknown.
        unusable: reasons for which stored entries cannot be used, by name of the entry.
    """

    environments: Mapping[str, EnvironmentDescription]
    filters: Mapping[str, FilterDescription]
    confirmed: float | None = None
    unusable: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"<EnvironmentList: {len(self.environments)} environments>"  # no keys


class _Entry(Struct, rename="camel", omit_defaults=True):
    """An environment or a payload filter. ld-relay passes over the members that it does not know.

    Args:
        kind: `environment` or `filter`.
        model_version: number of the form.
        data: LaunchDarkly's representation.
        confirmed: Unix milliseconds at which LaunchDarkly last confirmed the list; ours.
        owner: stands for the automatic configuration key to which the list belongs; ours.
    """

    kind: str
    model_version: int
    data: msgspec.Raw
    confirmed: int | None = None
    owner: str = ""


def entries_of(environments: EnvironmentList, owner: str = "") -> dict[str, bytes]:
    """Return the entries to store, by name.

    Args:
        environments: the list.
        owner: stands for the automatic configuration key; nobody else may use the list.
    """
    confirmed = None
    if environments.confirmed is not None:
        confirmed = round(environments.confirmed * 1000)

    def entry(kind: str, value: object) -> bytes:
        data = msgspec.Raw(msgspec.json.encode(value))
        return msgspec.json.encode(_Entry(kind, FORMAT, data, confirmed, owner))

    result = {}
    for identifier, description in environments.environments.items():
        name = _PREFIXES[ENVIRONMENT] + identifier
        result[name] = entry(ENVIRONMENT, represent(description))
    for identifier, payload_filter in environments.filters.items():
        result[_PREFIXES[FILTER] + identifier] = entry(FILTER, represent_filter(payload_filter))
    return result


def list_of(entries: Mapping[str, bytes], owner: str = "") -> EnvironmentList:
    """Return the list that stored entries are; malformed ones do not spoil the others.

    Args:
        entries: by name.
        owner: as it was stored; entries without an owner are anybody's.
    """
    environments: dict[str, EnvironmentDescription] = {}
    filters: dict[str, FilterDescription] = {}
    unusable: dict[str, str] = {}
    times: list[int] = []
    for name, content in entries.items():
        try:
            entry = _read(name, content)
            if entry.owner and entry.owner != owner:
                unusable[name] = "it belongs to another automatic configuration key"
                continue
            identifier = name.removeprefix(_PREFIXES[entry.kind])
            value = decoded(name, entry.data)
            if entry.kind == FILTER:
                filters[identifier] = describe_filter(value)
            elif (environment := describe(value)).id == identifier:
                environments[identifier] = environment
            else:
                unusable[name] = "it is in the place of another environment"
        except InvalidData as e:
            unusable[name] = e.reason
        else:
            times += [] if entry.confirmed is None else [entry.confirmed]
    confirmed = min(times) / 1000 if times else None
    return EnvironmentList(environments, filters, confirmed, unusable)


def is_name(name: str) -> bool:
    """Return whether an entry may have a name."""
    return name.startswith(tuple(_PREFIXES.values()))


def _read(name: str, content: bytes) -> _Entry:
    """Return an entry.

    Raises:
        InvalidData: it has another form.
    """
    try:
        entry = msgspec.json.decode(content, type=_Entry)
    except (msgspec.DecodeError, RecursionError) as e:
        raise InvalidData(name, str(e)) from e
    if not OLDEST_FORMAT <= entry.model_version <= FORMAT:
        raise InvalidData(name, f"it has form {entry.model_version}")
    if not name.startswith(_PREFIXES.get(entry.kind, name + name)):
        raise InvalidData(name, f"its kind is {entry.kind!r}")
    return entry
