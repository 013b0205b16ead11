"""Keys beside others in the slots of a cluster, and what scripts do with them; pure.

Where no transaction holds all keys of a patch, a fence in each slot keeps those out who are late:
it holds the highest number whose owner has written there, and whoever has a lower one writes
nothing there any more.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Iterable, Sequence

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from relay.steps import Steps
from relay.stores.redis.connections import Command

_NIBBLES = 5
"""Letters of a suffix, each of 16: enough to reach all slots, which a test shows."""

_LETTERS = 0x40
"""Code of the first of the 16 letters, `@` to `O`."""

_GUARD = "if tonumber(redis.call('GET', KEYS[1]) or 0) > tonumber(ARGV[1]) then return 0 end "

_MARK = "if ARGV[2] == 'mark' then redis.call('SET', KEYS[1], ARGV[1]) end "

_WRITE = (
    _GUARD + _MARK + "for i = 2, #KEYS do redis.call(ARGV[i + 2], KEYS[i], ARGV[3]) end return 1"
)

_MOVE = (
    _GUARD + "local stored = redis.call('GET', KEYS[2]) "
    "if (stored and '=' .. stored or '') ~= ARGV[3] then return 0 end "
    + _MARK
    + "if ARGV[4] then redis.call('SET', KEYS[2], ARGV[4]) end return 1"
)


class Fences:
    """Names of the fences of one environment.

    Args:
        prefix: of their keys, without a hash tag.
    """

    def __init__(self, prefix: str) -> None:
        self._start = f"{prefix}:$relay:fence:"
        self._slot = key_slot((self._start + _suffix(0)).encode())

    def __repr__(self) -> str:
        return f"<Fences {self._start!r}>"

    def beside(self, key: str) -> str:
        """Return the key of the fence in the slot of a key."""
        return self._in(key_slot(key.encode()))

    def _in(self, slot: int) -> str:
        # A checksum of texts of one length is linear: what differs in the suffix, and nothing
        # else, says what differs in the slot.
        return self._start + _suffix(_bits_for(slot ^ self._slot))

    def writes(
        self, number: int, commands: Iterable[Sequence[str]], *, mark: bool
    ) -> Steps[list[Command]]:
        """Return commands of one argument as scripts that the fences let pass, one for each slot.

        A script returns 0 if its fence has a higher number.

        Args:
            number: of the writer.
            commands: name, key and argument; the argument is the same for all.
            mark: True to leave the number at the fences.
        """
        by_slot: dict[int, list[Sequence[str]]] = {}
        for command in commands:
            by_slot.setdefault(key_slot(command[1].encode()), []).append(command)
            yield
        scripts: list[Command] = []
        for slot, those in by_slot.items():
            names, keys, arguments = zip(*those, strict=True)
            count, fence = str(len(keys) + 1), self._in(slot)
            given = (str(number), _mark(mark), arguments[0], *names)
            scripts.append(("EVAL", _WRITE, count, fence, *keys, *given))
            yield
        return scripts

    def move(
        self, number: int, key: str, before: str | None, after: str | None, *, mark: bool
    ) -> Command:
        """Return a script that changes a value if the fence lets it pass, and it is as before.

        It returns 0 if it is not so.

        Args:
            number: of the writer.
            key: of the value.
            before: value that it must have; None if it must not exist.
            after: value to set; None to leave it.
            mark: True to leave the number at the fence.
        """
        expected = "" if before is None else f"={before}"
        new = () if after is None else (after,)
        given = (str(number), _mark(mark), expected, *new)
        return ("EVAL", _MOVE, "2", self.beside(key), key, *given)


def _mark(mark: bool) -> str:
    return "mark" if mark else ""


def _suffix(bits: int) -> str:
    return bytes(_LETTERS | bits >> 4 * place & 0xF for place in range(_NIBBLES)).decode()


def _difference(bits: int) -> int:
    """Return the difference between the slots of keys whose suffixes differ in some bits."""
    content = bytes(bits >> 4 * place & 0xF for place in range(_NIBBLES))
    return crc_hqx(content, 0) % REDIS_CLUSTER_HASH_SLOTS


def _basis() -> dict[int, tuple[int, int]]:
    """Return, by the length of a difference in binary, one of these and its bits of a suffix."""
    basis: dict[int, tuple[int, int]] = {}
    for place in range(4 * _NIBBLES):
        bits = 1 << place
        difference = _difference(bits)
        while difference and difference.bit_length() in basis:
            known = basis[difference.bit_length()]
            difference, bits = difference ^ known[0], bits ^ known[1]
        if difference:
            basis[difference.bit_length()] = difference, bits
    return basis


_BASIS = _basis()


def _bits_for(difference: int) -> int:
    """Return the bits of a suffix that make a difference between slots."""
    bits = 0
    while difference:
        known = _BASIS[difference.bit_length()]
        difference, bits = difference ^ known[0], bits ^ known[1]
    return bits
