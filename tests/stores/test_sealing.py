"""Encryption: whoever has no key learns nothing, and changes nothing unnoticed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.sealing import NONCE_SIZE, Seal, SealedEntries, derived
from tests.support.environments import description

KEY = b"k" * 32
LIST = EnvironmentList({"id-alpha": describe(description())}, {}, 5.0)


@given(st.binary(), st.binary(max_size=5), st.binary(min_size=32, max_size=32))
def test_what_is_closed_is_opened(content, place, key):
    """And never looks the same twice."""
    seal = Seal(key)
    assert seal.open(seal.close(content, place), place) == content
    assert seal.close(content, place) != seal.close(content, place)


@given(st.data())
def test_any_change_is_noticed(data):
    """A bit that is turned, a byte that is missing or too much; another key, another place."""
    sealed = Seal(KEY).close(b"content", b"place")
    at = data.draw(st.integers(0, len(sealed) - 1))
    turned = bytearray(sealed)
    turned[at] ^= 1 << data.draw(st.integers(0, 7))
    for changed in (bytes(turned), sealed[:at], sealed[at + 1 :], sealed + b"x"):
        with pytest.raises(InvalidData, match="another key, or has been altered"):
            Seal(KEY).open(changed, b"place")
    for other, place in ((Seal(b"x" * 32), b"place"), (Seal(KEY), b"elsewhere")):
        with pytest.raises(InvalidData):
            other.open(sealed, place)


def test_derived_keys_say_nothing_of_each_other():
    """Each purpose has its own, always the same."""
    made = {derived(key, purpose) for key in ("rel-1", "rel-2") for purpose in ("a", "b")}
    assert len(made) == 4
    assert derived("rel-1", "a") in made


def test_entries_have_ld_relays_encryption():
    """AES-256-GCM after a nonce of 12 bytes, with the digest of a text as the key."""
    key = hashlib.sha256(b"a-long-random-text").digest()
    entries = SealedEntries(AutoConfigKey("rel-1"), Secret("a-long-random-text"))
    [(name, sealed)] = entries.close(LIST).items()
    content = AESGCM(key).decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], None)
    assert (name, json.loads(content)["data"]["envID"]) == ("env:id-alpha", "id-alpha")
    assert entries.open({name: sealed}) == LIST


def test_entries_that_cannot_be_opened_are_left_out():
    """The others are used."""
    both = EnvironmentList({**LIST.environments, "e": describe(description(envID="e"))}, {})
    entries = SealedEntries(AutoConfigKey("rel-1"), Secret(""))
    read = entries.open(entries.close(both) | {"env:e": b"short"})
    assert list(read.environments) == ["id-alpha"]
    assert list(read.unusable) == ["env:e"]
    with pytest.raises(InvalidData, match="another key, or has been altered"):
        entries.open({"env:e": b"short"})


def test_the_library_is_imported_with_the_first_use_only():
    """It takes a tenth of a start."""
    code = """
import sys
import relay.autoconfig, relay.stores.dynamodb.list, relay.stores.listfile, relay.stores.redis.list
assert "cryptography.hazmat.primitives.ciphers.aead" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
