"""Items of a DynamoDB table as SDKs in daemon mode read them (datastore 4.1, 4.4); pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from relay.errors import InvalidData
from relay.model.item import InvalidItem, Item, Kind, parse
from relay.model.payload import Payload
from relay.steps import Steps
from relay.stores import UNREADABLE, Key, Stored, Version, Versions
from relay.stores.items import KIND_NAMES, stored_json, version_of

MAX_SIZE = 400_000
"""Size of an item, as `size` estimates it, that SDKs and ld-relay allow."""

MAX_KEY = 1024
"""Bytes of a key, which DynamoDB limits."""

MAX_BATCH = 25
"""Writes of one request, which DynamoDB limits."""

MAX_BODY = 400_000
"""Characters of JSON in one request, so that the event loop is not held while it is encoded. Only
a single item may have more."""

FINGERPRINT = "relayFingerprint"
"""Attribute of the marker with the fingerprint of the items. SDKs read none of its attributes."""

Attributes = dict[str, Any]
"""An item of the table, as DynamoDB's API has it: `{"version": {"N": "5"}}`."""


class Layout:
    """Keys and attributes of one environment in a table.

    Args:
        prefix: prefix of the namespaces; may be empty.
    """

    def __init__(self, prefix: str) -> None:
        self._start = f"{prefix}:" if prefix else ""
        name = f"{self._start}$inited"
        self.marker: Attributes = {"namespace": {"S": name}, "key": {"S": name}}

    def namespace(self, kind: Kind) -> str:
        """Return the partition key of all items of a kind."""
        return self._start + KIND_NAMES[kind]

    def key(self, kind: Kind, key: str) -> Attributes:
        """Return the primary key of an item."""
        return {"namespace": {"S": self.namespace(kind)}, "key": {"S": key}}

    def attributes(self, item: Item) -> Attributes:
        """Return a whole item."""
        return {
            **self.key(item.kind, item.key),
            "version": {"N": str(item.version)},
            "item": {"S": stored_json(item).decode()},
        }

    def writes(
        self, items: Iterable[Item], stored: Iterable[tuple[Kind, Attributes]]
    ) -> Steps[tuple[list[Attributes], list[Attributes]]]:
        """Return the puts and the removals after which a table holds these items and no others.

        There is a step for each item.

        Args:
            items: in the order in which to write them.
            stored: all items of the table, some of which may be equal.
        """
        others: dict[Key, Attributes] = {}
        for kind, attributes in stored:
            others[kind, attributes["key"]["S"]] = attributes
            yield
        puts: list[Attributes] = []
        for item in items:
            attributes = self.attributes(item)
            if others.pop((item.kind, item.key), None) != attributes:
                puts.append({"PutRequest": {"Item": attributes}})
            yield
        removals: list[Attributes] = []
        for kind, key in others:
            removals.append({"DeleteRequest": {"Key": self.key(kind, key)}})
            yield
        return puts, removals

    def problem_with(self, item: Item) -> str | None:
        """Return why a table cannot hold an item; None if it can."""
        length = len(item.key.encode())
        if not 0 < length <= MAX_KEY:
            return f"its key has {length} bytes, and DynamoDB takes 1 to {MAX_KEY}"
        if (size := self.size(item)) > MAX_SIZE:
            return f"it has about {size} bytes, and an item of DynamoDB has at most {MAX_SIZE}"
        return None

    def size(self, item: Item) -> int:
        """Return the estimate of an item's size that SDKs and ld-relay make (datastore 4.4)."""
        texts = (self.namespace(item.kind).encode(), item.key.encode(), b"%d" % item.version)
        names = len("namespace") + len("key") + len("version") + len("item")
        return 100 + names + sum(map(len, texts)) + len(stored_json(item))


def stored_version(attributes: Mapping[str, Any]) -> Version:
    """Return the version by which a stored item is compared.

    The attribute counts if there is one other than 0, and the JSON otherwise.
    """
    version = version_of(_json(attributes))
    if version == UNREADABLE:
        return UNREADABLE
    text = _number(attributes)
    try:
        number = int(text) if text.isdigit() else int(float(text))
    except (ValueError, OverflowError):
        return version
    return version._replace(number=number) if number else version


def parse_stored(pages: Iterable[tuple[Kind, Attributes]]) -> Steps[Stored]:
    """Return the content of a table, with a step for each item."""
    items: list[Item] = []
    invalid: list[InvalidItem] = []
    for kind, attributes in pages:
        key = attributes["key"]["S"]
        if "S" not in attributes.get("item", {}):
            invalid.append(InvalidItem(kind, key, 'there is no text attribute "item"'))
        else:
            try:
                items.append(parse(kind, key, _json(attributes)))
            except InvalidData as e:
                invalid.append(InvalidItem(kind, key, e.reason))
        yield
    return Stored(Payload.of(items), tuple(invalid))


def parse_versions(pages: Iterable[tuple[Kind, Attributes]]) -> Steps[Versions]:
    """Return the versions of all items, with a step for each."""
    versions: dict[Key, Version] = {}
    for kind, attributes in pages:
        versions[kind, attributes["key"]["S"]] = stored_version(attributes)
        yield
    return versions


def in_batches(writes: Iterable[Attributes]) -> Iterator[list[Attributes]]:
    """Yield groups of writes for one request each."""
    batch: list[Attributes] = []
    room = MAX_BODY
    for write in writes:
        text = write.get("PutRequest", {}).get("Item", {}).get("item", {}).get("S", "")
        if batch and (len(batch) == MAX_BATCH or len(text) > room):
            yield batch
            batch, room = [], MAX_BODY
        batch.append(write)
        room -= len(text)
    if batch:
        yield batch


def _json(attributes: Mapping[str, Any]) -> bytes:
    text: str = attributes.get("item", {}).get("S", "")
    return text.encode()


def _number(attributes: Mapping[str, Any]) -> str:
    number: str = attributes.get("version", {}).get("N", "")
    return number
