"""Keys of items in Consul that SDKs in daemon mode read, and transactions (datastore 4.5); pure.

One key holds the JSON of each item; an empty value under another marks all as complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from relay.model.environment import DEFAULT_PREFIX
from relay.model.item import Kind
from relay.model.text import one_line
from relay.stores import Key
from relay.stores.items import KIND_NAMES, Entry

MAX_OPERATIONS = 64
"""Operations in one transaction that every version of Consul accepts."""

MAX_TRANSACTION = 512 * 1024
"""Bytes of one transaction that Consul accepts by default, values as base64 (`txn_max_req_len`)."""

_FRAME = len("[]")


class Layout:
    """Keys of one environment.

    Args:
        prefix: prefix of the keys; empty for `launchdarkly`.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = one_line(prefix or DEFAULT_PREFIX)
        self.marker = f"{self.prefix}/$inited"
        self.notes = f"{self.prefix}/$relay"
        """Key of what relays write for each other; SDKs do not read it."""

    def folder(self, kind: Kind) -> str:
        """Return what the keys of a kind begin with.

        It ends with a slash: the keys of a prefix `prod` are never taken for those of `prod-eu`.
        """
        return f"{self.prefix}/{KIND_NAMES[kind]}/"

    def key(self, kind: Kind, key: str) -> str:
        """Return the key of an item."""
        return self.folder(kind) + key

    def item_key(self, key: str) -> Key | None:
        """Return kind and key of the item at a key; None if it is that of no item."""
        for kind in Kind:
            if key.startswith(folder := self.folder(kind)):
                return kind, key.removeprefix(folder)
        return None

    def entries(self, results: Iterable[Raw]) -> Iterator[Entry]:
        """Yield the items among the results of a transaction.

        Raises:
            msgspec.MsgspecError: a result is not one of Consul's.
        """
        for raw in results:
            pair = pair_of(raw)
            if item_key := self.item_key(pair.key):
                yield (*item_key, pair.value)


class Scope(Struct, frozen=True):
    """Part of the key space, in Consul Enterprise. Empty names stand for the token's own."""

    namespace: str = ""
    partition: str = ""


class Operation(Struct, frozen=True, omit_defaults=True, rename="pascal"):
    """One operation of a transaction.

    Args:
        verb: what is done.
        key: key, or what the keys begin with.
        value: new value.
        index: modification index that the key must have; 0 if it must not exist.
        namespace: see `Scope`.
        partition: see `Scope`.
    """

    verb: str
    key: str
    value: bytes | None = None
    index: int = 0
    namespace: str = ""
    partition: str = ""


class Pair(Struct, frozen=True):
    """A key with its value, and the index at which it was last modified."""

    key: str
    value: bytes
    index: int


class Failure(Struct, frozen=True):
    """Reason for which a transaction was not carried out.

    Args:
        operation: position of the operation.
        reason: in Consul's words.
    """

    operation: int = msgspec.field(name="OpIndex", default=0)
    reason: str = msgspec.field(name="What", default="")

    @property
    def is_missing(self) -> bool:
        """True if a key that was to be read does not exist."""
        return self.reason.endswith("doesn't exist")

    @property
    def is_stale(self) -> bool:
        """True if another writer has modified the key."""
        return self.reason.endswith("index is stale")

    @property
    def is_denied(self) -> bool:
        """True if the token lacks a permission."""
        return "Permission denied" in self.reason


class Reply(Struct, frozen=True):
    """Reply to a transaction: the results, or the reasons for which nothing was done."""

    results: list[Raw] | None = msgspec.field(name="Results", default=None)
    failures: list[Failure] | None = msgspec.field(name="Errors", default=None)


class Write(Struct, frozen=True):
    """Operations to carry out together.

    Args:
        operations: the operations.
        body: transaction of them; None if the only operation does not fit into one.
    """

    operations: tuple[Operation, ...]
    body: bytes | None


class _Member(Struct, frozen=True):
    operation: Operation = msgspec.field(name="KV")


class _Pair(Struct, frozen=True, rename="pascal"):
    key: str
    value: bytes | None = None
    modify_index: int = 0


class _Result(Struct, frozen=True):
    pair: _Pair = msgspec.field(name="KV")


_RESULT = msgspec.json.Decoder(_Result)
_REPLY = msgspec.json.Decoder(Reply)


def pair_of(raw: Raw) -> Pair:
    """Return the pair that a result of a transaction holds.

    Raises:
        msgspec.MsgspecError: it is not one of Consul's.
    """
    pair = _RESULT.decode(raw).pair
    return Pair(pair.key, pair.value or b"", pair.modify_index)


def reply_of(body: bytes) -> Reply:
    """Return the reply to a transaction.

    Raises:
        msgspec.MsgspecError: it is not one of Consul's.
    """
    return _REPLY.decode(body)


def get(key: str) -> Operation:
    """Return the operation that reads a key, and fails without it."""
    return Operation("get", key)


def get_all(folder: str) -> Operation:
    """Return the operation that reads all keys in a folder, be there any or none."""
    return Operation("get-tree", folder)


def put(key: str, value: bytes) -> Operation:
    """Return the operation that writes a key, whatever it holds."""
    return Operation("set", key, value)


def put_if(key: str, value: bytes, index: int) -> Operation:
    """Return the operation that writes a key if it was last modified at `index`; 0 if never."""
    return Operation("cas", key, value, index)


def delete(key: str) -> Operation:
    """Return the operation that deletes a key, if it exists."""
    return Operation("delete", key)


def writes(
    operations: Iterable[Operation], scope: Scope, guards: Sequence[Operation] = ()
) -> Iterator[Write]:
    """Yield operations in order, in as many writes as Consul's limits demand.

    Args:
        operations: the operations.
        scope: scope of their keys.
        guards: operations that begin each transaction, so that it fails if they fail.
    """
    head = [_member(each, scope) for each in guards]
    head_size = _FRAME + sum(len(each) + 1 for each in head)
    gathered: list[Operation] = []
    members: list[bytes] = []
    size = head_size

    def transaction() -> Write:
        return Write((*guards, *gathered), b"[%b]" % b",".join([*head, *members]))

    for operation in operations:
        member = _member(operation, scope)
        cost = len(member) + 1
        full = len(guards) + len(gathered) >= MAX_OPERATIONS or size + cost > MAX_TRANSACTION
        if gathered and full:
            yield transaction()
            gathered, members, size = [], [], head_size
        if head_size + cost > MAX_TRANSACTION:
            yield Write((operation,), None)
            continue
        gathered.append(operation)
        members.append(member)
        size += cost
    if gathered:
        yield transaction()


def encode(operations: Iterable[Operation], scope: Scope) -> bytes:
    """Return the body of a transaction."""
    return b"[%b]" % b",".join([_member(each, scope) for each in operations])


def _member(operation: Operation, scope: Scope) -> bytes:
    scoped = replace(operation, namespace=scope.namespace, partition=scope.partition)
    return msgspec.json.encode(_Member(scoped))
