"""Messages of the automatic-configuration stream, and the list that they keep. Pure.

The form is that of offline-and-autoconfig 7.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

from msgspec import Struct

from relay.errors import InvalidData
from relay.protocol.environments import (
    EnvironmentDescription,
    Members,
    decoded,
    describe,
    integer_in,
    members_of,
    text_in,
)
from relay.steps import Steps

MAX_TOMBSTONES = 10_000
"""Maximum number of versions of deleted IDs to remember; each put forgets what it does not name."""


class FilterDescription(Struct, frozen=True):
    """Description of a payload filter.

    Args:
        version: grows with each change.
        project_key: key of the project whose environments it filters.
        key: with which requests choose it.
    """

    version: int
    project_key: str
    key: str


Description = EnvironmentDescription | FilterDescription
ValueT = TypeVar("ValueT", EnvironmentDescription, FilterDescription)


class Put(Struct, frozen=True):
    """All environments and filters.

    Args:
        environments: by ID.
        filters: by ID.
        invalid_environments: reasons for which entries cannot be used, by ID; what is known of them
            stays.
        invalid_filters: likewise.
    """

    full: ClassVar[bool] = True
    environments: Mapping[str, EnvironmentDescription]
    filters: Mapping[str, FilterDescription]
    invalid_environments: Mapping[str, str] = {}
    invalid_filters: Mapping[str, str] = {}


class Upsert(Struct, frozen=True):
    """A new environment or filter, or a new version of one."""

    full: ClassVar[bool] = False
    id: str
    value: Description


class Delete(Struct, frozen=True):
    """An environment or filter is gone.

    Args:
        of: type of what is gone.
        id: its ID.
        version: up to which it is gone.
    """

    full: ClassVar[bool] = False
    of: type[Description]
    id: str
    version: int


class Ignored(Struct, frozen=True):
    """A message without effect.

    Args:
        reason: a sentence for the log.
    """

    full: ClassVar[bool] = False
    reason: str


Message = Put | Upsert | Delete | Ignored

_KINDS: Mapping[str, type[Description]] = {
    "/environments": EnvironmentDescription,
    "/filters": FilterDescription,
}


def read(event: str, content: bytes) -> Steps[Message]:
    """Return the message that an event is, with a step for each entry of a list.

    Args:
        event: `put`, `patch` or `delete`.
        content: data of the event.

    Raises:
        InvalidData: the event is malformed as a whole.
    """
    what = f"{event} message"
    members = members_of(what, decoded(what, content))
    path = text_in(what, members, "path")
    if event == "put":
        if path != "/":
            return Ignored(f'Ignoring "put" event for unknown path "{path}"')
        return (yield from _put(members))
    folder, _, identifier = path.rpartition("/")
    kind = _KINDS.get(folder)
    if kind is None or not identifier:
        return Ignored(f'Ignoring "{event}" event for unknown path "{path}"')
    if event == "delete":
        return Delete(kind, identifier, integer_in(what, members, "version"))
    return _patch(kind, identifier, members)


def _patch(kind: type[Description], identifier: str, members: Members) -> Message:
    if "data" not in members:
        raise InvalidData("patch message", "there is no data")
    if members["data"] is None:
        return Ignored(f'Ignoring a patch of "{identifier}" without data')
    if kind is FilterDescription:
        return Upsert(identifier, describe_filter(members["data"]))
    environment = describe(members["data"])
    mismatch = _mismatch(identifier, environment)
    return Ignored(mismatch) if mismatch else Upsert(identifier, environment)


def _put(members: Members) -> Steps[Put]:
    """Return a put; malformed entries do not spoil the others.

    ld-relay takes a put without a list for an empty one, and would end all service.
    """
    what = "put message"
    data = members_of(f"{what}, data", members.get("data"))
    entries = data.get("environments")
    if not isinstance(entries, dict):
        raise InvalidData(what, "there is no list of environments")
    environments: dict[str, EnvironmentDescription] = {}
    invalid_environments: dict[str, str] = {}
    for identifier, entry in entries.items():
        try:
            environment = describe(entry)
        except InvalidData as e:
            text = f"Ignoring environment data with key {identifier!r}: {e}"
            invalid_environments[identifier] = text
        else:
            if mismatch := _mismatch(identifier, environment):
                invalid_environments[identifier] = mismatch
            else:
                environments[identifier] = environment
        yield
    filters: dict[str, FilterDescription] = {}
    invalid_filters: dict[str, str] = {}
    filter_entries = data.get("filters") or {}
    if not isinstance(filter_entries, dict):
        raise InvalidData(what, "filters is not an object")
    for identifier, entry in filter_entries.items():
        try:
            filters[identifier] = describe_filter(entry)
        except InvalidData as e:
            text = f"Ignoring filter data with key {identifier!r}: {e}"
            invalid_filters[identifier] = text
    return Put(environments, filters, invalid_environments, invalid_filters)


def _mismatch(identifier: str, environment: EnvironmentDescription) -> str:
    """Return the reason for which an entry cannot belong to its key; empty if it can."""
    if not identifier:
        return "Ignoring environment data without an ID"
    if environment.id == identifier:
        return ""
    return (
        f'Ignoring environment data whose envId "{environment.id}" did not match key "{identifier}"'
    )


def describe_filter(value: object) -> FilterDescription:
    """Return the description of a payload filter that a decoded JSON value is.

    Raises:
        InvalidData: a member has a wrong type, or there is no key.
    """
    members = members_of("filter", value)
    key = text_in("filter", members, "key")
    if not key:
        raise InvalidData("filter", "there is no key")
    version = integer_in("filter", members, "version")
    return FilterDescription(version, text_in("filter", members, "projkey"), key)


def represent_filter(description: FilterDescription) -> dict[str, object]:
    """Return the JSON value that `describe_filter` reads."""
    return {
        "projKey": description.project_key,
        "key": description.key,
        "version": description.version,
    }


class ListChange(Struct, Generic[ValueT], frozen=True):
    """A change of a list.

    Args:
        id: ID of what has changed.
        before: None if it is new.
        after: None if it is gone.
    """

    id: str
    before: ValueT | None
    after: ValueT | None


class VersionedList(Generic[ValueT]):
    """Descriptions by LaunchDarkly, by ID; keeps the table of version rules."""

    def __init__(self) -> None:
        self._values: dict[str, ValueT] = {}
        self._tombstones: dict[str, int] = {}
        """Versions up to which IDs are gone."""

    def __repr__(self) -> str:
        return f"<VersionedList: {len(self)}, {len(self._tombstones)} tombstones>"

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> Sequence[ValueT]:
        """Return all descriptions."""
        return tuple(self._values.values())

    def by_id(self) -> Mapping[str, ValueT]:
        """Return all descriptions by ID: those of now."""
        return dict(self._values)

    def put(
        self, values: Mapping[str, ValueT], kept: Mapping[str, object], *, outranks: bool = False
    ) -> Iterator[ListChange[ValueT]]:
        """Take over a whole list, change by change.

        Args:
            values: by ID.
            kept: IDs of which nothing but their presence is known.
            outranks: whatever differs is taken, whichever version is known.
        """
        for identifier, value in values.items():
            yield from (self._set if outranks else self.upsert)(identifier, value)
        present = values.keys() | kept.keys()
        for identifier in [each for each in self._values if each not in present]:
            yield ListChange(identifier, self._values.pop(identifier), None)
        self._tombstones = {k: v for k, v in self._tombstones.items() if k in present}

    def upsert(self, identifier: str, value: ValueT) -> Iterator[ListChange[ValueT]]:
        """Take over one description, unless it is older than what is known."""
        if value.version > self._version(identifier):
            yield from self._set(identifier, value)

    def delete(self, identifier: str, version: int) -> Iterator[ListChange[ValueT]]:
        """Remove one description, unless that is older than what is known."""
        if version > self._version(identifier):
            self._tombstones.pop(identifier, None)
            self._tombstones[identifier] = version
            if len(self._tombstones) > MAX_TOMBSTONES:
                del self._tombstones[next(iter(self._tombstones))]
            if (before := self._values.pop(identifier, None)) is not None:
                yield ListChange(identifier, before, None)

    def forget(self, identifier: str) -> None:
        """Forget an ID, so that any version of it is new."""
        self._values.pop(identifier, None)

    def _set(self, identifier: str, value: ValueT) -> Iterator[ListChange[ValueT]]:
        self._tombstones.pop(identifier, None)
        before = self._values.get(identifier)
        if value != before:
            self._values[identifier] = value
            yield ListChange(identifier, before, value)

    def _version(self, identifier: str) -> float:
        """Return the known version; less than any if nothing is known."""
        if (value := self._values.get(identifier)) is not None:
            return value.version
        return self._tombstones.get(identifier, -float("inf"))
