"""Contract tests for the list of environments in a database, in ld-relay's form."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from relay.errors import InvalidData
from relay.protocol.autoconfig import FilterDescription
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.listmirror import ListStore
from tests.support.environments import description, payload_filter

KEY = "rel-5ca1ab1e-0001"
SECRETS = ["", "a-long-random-text"]
LIST = EnvironmentList(
    {"id-alpha": describe(description())}, {"f": FilterDescription(1, "proj", "north")}, 5.0
)
BETA = EnvironmentList({"id-beta": describe(description("beta"))}, {}, 6.0)
NAMES = ["env:id-alpha", "filter:f"]


class Database(ABC):
    """A database that may hold a list."""

    @abstractmethod
    def stored(self, owner: str = KEY, secret: str = "") -> AbstractAsyncContextManager[ListStore]:
        """Open the place of the list."""

    @abstractmethod
    def content(self) -> Mapping[str, bytes]:
        """Return what is there, by name, without the time of the confirmation."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Write one entry as ld-relay does."""

    async def load(self, *args: str) -> EnvironmentList | None:
        """Return the list, as a new relay reads it."""
        async with self.stored(*args) as place:
            return await place.load()

    async def save(self, content: EnvironmentList, *args: str) -> None:
        """Write a list, as a relay does."""
        async with self.stored(*args) as place:
            await place.save(content)


def seal(secret: str, content: object) -> bytes:
    """Return content as ld-relay encrypts it."""
    nonce, key = os.urandom(12), hashlib.sha256(secret.encode()).digest()
    return nonce + AESGCM(key).encrypt(nonce, json.dumps(content).encode(), None)


class StoredListContract:
    """Subclass it with a fixture `database`, in which there is no list."""

    @pytest.mark.parametrize("secret", SECRETS)
    async def test_the_list_survives(self, database, secret):
        """Each write leaves nothing of the one before, and nothing is readable."""
        assert await database.load(KEY, secret) is None
        await database.save(LIST, KEY, secret)
        assert await database.load(KEY, secret) == LIST
        assert sorted(database.content()) == NAMES
        assert all(b"alpha" not in each for each in database.content().values())
        await database.save(BETA, KEY, secret)
        assert await database.load(KEY, secret) == BETA
        await database.save(EnvironmentList({}, {}), KEY, secret)
        assert await database.load(KEY, secret) is None

    @pytest.mark.parametrize("secret", SECRETS)
    async def test_what_ld_relay_has_stored_is_used(self, database, secret):
        """The list of a relay that this one replaces, or that stands beside it."""
        environment = {"kind": "environment", "modelVersion": 2, "data": description()}
        north = {"kind": "filter", "modelVersion": 2, "data": payload_filter("north")}
        database.put("env:id-alpha", seal(secret or KEY, environment))
        database.put("filter:f", seal(secret or KEY, north))
        read = await database.load(KEY, secret)
        assert (read.environments, read.filters) == (LIST.environments, LIST.filters)
        assert read.confirmed is None

    @pytest.mark.parametrize("secret", SECRETS)
    async def test_ld_relay_reads_what_is_stored(self, database, secret):
        """Entries of its form."""
        await database.save(LIST, KEY, secret)
        key = hashlib.sha256((secret or KEY).encode()).digest()
        for name, kind in zip(NAMES, ("environment", "filter"), strict=True):
            sealed = database.content()[name]
            content = json.loads(AESGCM(key).decrypt(sealed[:12], sealed[12:], None))
            assert (content["kind"], content["modelVersion"]) == (kind, 2)

    @pytest.mark.parametrize(
        ("owner", "secret", "reason"),
        [
            (KEY, "another", "another key, or has been altered"),
            ("rel-other", "", "another key, or has been altered"),
            ("rel-other", "text", "belongs to another automatic configuration key"),
        ],
    )
    async def test_a_list_of_others_is_not_used(self, database, owner, secret, reason):
        """The next write replaces it."""
        before = "text" if secret == "text" else ""
        await database.save(LIST, KEY, before)
        with pytest.raises(InvalidData, match=reason):
            await database.load(owner, secret)
        await database.save(LIST, owner, secret)
        assert await database.load(owner, secret) == LIST

    async def test_an_altered_entry_is_not_used_and_is_written_again(self, database):
        """The rest is used."""
        both = EnvironmentList(
            {**LIST.environments, "e": describe(description(envID="e"))}, {}, 5.0
        )
        await database.save(both)
        database.put("env:e", b"x" * 100)
        read = await database.load()
        assert list(read.environments) == ["id-alpha"]
        assert list(read.unusable) == ["env:e"]
        await database.save(both)
        assert await database.load() == both

    async def test_a_long_list_is_whole(self, database):
        """However many requests it takes."""
        many = {
            f"e{n}": describe(description(envID=f"e{n}", envName="x" * 900)) for n in range(500)
        }
        await database.save(EnvironmentList(many, {}))
        assert (await database.load()).environments == many
