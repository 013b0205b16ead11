"""Encryption of what is stored and holds keys: AES-256-GCM, which also notices any change.

The library is imported with the first use, in a thread: it takes longer than all that it does here.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from msgspec.structs import replace

from relay.errors import InvalidData
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList, entries_of, list_of

NONCE_SIZE = 12
"""Bytes of the random number before each sealed content. It may repeat only after billions of
writes with one key; a list that is written each minute needs centuries."""


class Seal:
    """Encrypts and decrypts with one key. Both block; any thread may call them.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<Seal>"  # no key

    def close(self, content: bytes, place: bytes = b"") -> bytes:
        """Return the content encrypted.

        Args:
            content: of any length.
            place: where it belongs; it opens nowhere else.
        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - see above

        nonce = secrets.token_bytes(NONCE_SIZE)
        return nonce + AESGCM(self._key).encrypt(nonce, content, place)

    def open(self, sealed: bytes, place: bytes = b"") -> bytes:
        """Return the content of what `close` has returned.

        Raises:
            InvalidData: it was closed with another key or for another place, or was changed since.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        nonce, rest = sealed[:NONCE_SIZE], sealed[NONCE_SIZE:]
        try:
            return AESGCM(self._key).decrypt(nonce, rest, place)
        except (InvalidTag, ValueError) as e:
            reason = "it was encrypted with another key, or has been altered"
            raise InvalidData("sealed content", reason) from e


def derived(key: str, purpose: str) -> bytes:
    """Return 32 bytes that only who has a key can know, and that say nothing of it.

    Args:
        key: an automatic configuration key.
        purpose: different purposes have different results.
    """
    return hmac.digest(key.encode(), purpose.encode(), hashlib.sha256)


class SealedEntries:
    """Encrypts the list of one automatic configuration key entry by entry, as ld-relay does.

    The form of entries is that of newer-versions 10.2. All methods block; any thread may call them.

    Args:
        key: the automatic configuration key; only its list is used.
        encryption_key: encrypts the entries; empty for the automatic configuration key.
    """

    def __init__(self, key: AutoConfigKey, encryption_key: Secret) -> None:
        self.owner = derived(key.value, "relay: owner of the list of environments").hex()[:32]
        """Stands for the automatic configuration key."""
        secret = encryption_key.reveal() or key.value
        self.seal = Seal(hashlib.sha256(secret.encode()).digest())

    def __repr__(self) -> str:
        return "<SealedEntries>"  # no keys

    def close(self, environments: EnvironmentList) -> dict[str, bytes]:
        """Return the entries to store, each encrypted for itself."""
        entries = entries_of(environments, self.owner)
        return {name: self.seal.close(content) for name, content in entries.items()}

    def open(self, sealed: Mapping[str, bytes]) -> EnvironmentList:
        """Return the list that encrypted entries are; unusable ones are left out.

        Raises:
            InvalidData: all of them are unusable.
        """
        entries: dict[str, bytes] = {}
        unusable: dict[str, str] = {}
        for name, content in sealed.items():
            try:
                entries[name] = self.seal.open(content)
            except InvalidData as e:
                unusable[name] = e.reason
        result = list_of(entries, self.owner)
        unusable |= result.unusable
        if unusable and not result.environments and not result.filters:
            raise InvalidData("list", next(iter(unusable.values())))
        return replace(result, unusable=unusable)
