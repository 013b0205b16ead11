"""A document is a data store, wherever it lies."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace

import pytest

from relay.errors import ConfigError, StoreUnavailable
from relay.model.credential import Secret
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet, Payload
from relay.protocol import document
from relay.steps import finish
from relay.stores.documents.connect import Places
from relay.stores.documents.store import Renderings
from relay.stores.fingerprint import Fingerprint
from relay.upstream import Upstream
from tests.stores.contract import StoreContract, flag, segment
from tests.stores.documents.conftest import LOG, NAME, SPEC
from tests.support.keyvalue import KeyValueServer

ONE = Payload.of([flag("lamp", 1)])
TWO = Payload.of([flag("lamp", 2), segment("crowd", 1)])


class TestFolder(StoreContract):
    """The contract of all data stores, in a folder."""

    @pytest.fixture
    def store(self, tmp_path, open_store):
        return open_store(f"file://{tmp_path}/new")


class TestBucket(StoreContract):
    """The same in a bucket."""

    @pytest.fixture
    def store(self, bucket, open_store):
        return open_store(f"{bucket.url}/")


class TestValues(StoreContract):
    """The same in a key-value store that knows conditions."""

    @pytest.fixture
    def store(self, values, open_store):
        return open_store(values.url)


class TestPlainValues(StoreContract):
    """The same in one that knows neither conditions nor ETags."""

    @pytest.fixture
    async def store(self, open_store):
        async with KeyValueServer(etags=False, conditions=False) as values:
            yield open_store(values.url)


class AnyPlace:
    """A place of one kind, seen from outside."""

    def __init__(self, kind, tmp_path, values, bucket):
        self.kind, self._folder, self._values = kind, tmp_path, values
        self._bucket = bucket
        urls = {"file": f"file://{tmp_path}", "s3": bucket.url, "http": values.url}
        self.url = urls[kind]

    def get(self, name=NAME):
        if self.kind == "file":
            path = self._folder / name
            return path.read_bytes() if path.exists() else None
        if self.kind == "s3":
            return self._bucket.get(name)
        return self._values.values.get(name)

    def put(self, content, name=NAME):
        if self.kind == "file":
            temporary = self._folder / "new"
            temporary.write_bytes(content)
            temporary.replace(self._folder / name)
        elif self.kind == "s3":
            self._bucket.put(name, content)
        else:
            self._values.values[name] = content


@pytest.fixture(params=["file", "s3", "http"])
def place(request, tmp_path, values, bucket):
    return AnyPlace(request.param, tmp_path, values, bucket)


@pytest.fixture(params=["file", "s3"])
def two_forms(request, tmp_path, values, bucket):
    """A place that has the document in gzip, too."""
    return AnyPlace(request.param, tmp_path, values, bucket)


def fingerprint(payload):
    return finish(Fingerprint.of(payload))


async def test_the_document_is_the_poll_payload(place, open_store):
    """And the same in gzip, but for key-value stores, whose readers want the plain form."""
    await open_store(place.url).init(TWO)
    content = place.get()
    assert json.loads(content) == {
        "flags": {"lamp": {"key": "lamp", "version": 2}},
        "segments": {"crowd": {"key": "crowd", "version": 1}},
    }
    compressed = place.get(f"{NAME}.gz")
    assert (compressed is None) == (place.kind == "http")
    assert compressed is None or gzip.decompress(compressed) == content


async def test_versions_of_deleted_items_are_kept_beside(place, open_store):
    """So that nobody who is behind brings them back."""
    await open_store(place.url).init(Payload.of([flag("gone", 4, None), flag("lamp", 1)]))
    assert json.loads(place.get())["deleted"] == {"flags": {"gone": 4}}
    behind = open_store(place.url)
    assert await behind.upsert([flag("gone", 3), flag("new", 1)])
    assert set(json.loads(place.get())["flags"]) == {"lamp", "new"}


async def test_of_two_writers_none_is_lost(place, open_store):
    """Each adds to what the other has written since."""
    one, other = open_store(place.url), open_store(place.url)
    await one.init(ONE)
    for version in range(1, 6):
        await one.upsert([flag("one", version)])
        await other.upsert([flag("other", version), flag("lamp", version)])
        await one.upsert([flag("lamp", 1)])
    flags = json.loads(place.get())["flags"]
    assert {key: each["version"] for key, each in flags.items()} == {
        "lamp": 5,
        "one": 5,
        "other": 5,
    }


async def test_a_document_that_somebody_else_has_replaced_is_not_overwritten(place, open_store):
    """Whoever wants to replace everything has to compare again."""
    one, other = open_store(place.url), open_store(place.url)
    await one.init(ONE)
    await other.load()
    await one.upsert([flag("lamp", 9)])
    with pytest.raises(StoreUnavailable, match="another writer was faster"):
        await other.init(TWO)
    assert json.loads(place.get())["flags"]["lamp"]["version"] == 9
    assert await other.versions()
    await other.init(TWO)
    assert json.loads(place.get())["flags"]["lamp"]["version"] == 2


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"flags":', b"\x1f\x8b\x08"])
async def test_a_probe_notices_every_change(place, open_store, content):
    """Of content that somebody else has put there, damaged or not."""
    store = open_store(place.url)
    await store.init(ONE)
    await store.mark(fingerprint(ONE))
    assert await store.holds(fingerprint(ONE))
    place.put(content if content is not None else document.text(TWO))
    assert not await store.holds(fingerprint(ONE))
    loaded = await store.load()
    assert (loaded is None) == (content is not None)
    await store.init(TWO)
    assert json.loads(place.get())["flags"]["lamp"]["version"] == 2


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", document.compressed(document.text(ONE))])
async def test_a_form_that_is_behind_is_renewed(two_forms, open_store, content):
    """As after a kill between two writes, or if somebody damages one form."""
    await open_store(two_forms.url).init(TWO)
    two_forms.put(content, f"{NAME}.gz")
    store = open_store(two_forms.url)
    assert await store.versions()
    await store.mark(fingerprint(TWO))
    assert gzip.decompress(two_forms.get(f"{NAME}.gz")) == two_forms.get() == document.text(TWO)
    assert await store.holds(fingerprint(TWO))


async def test_what_only_the_compressed_form_has_is_not_lost(two_forms, open_store):
    """It is written first, so a killed writer leaves it newer than the plain one."""
    await open_store(two_forms.url).init(ONE)
    two_forms.put(document.compressed(document.text(TWO)), f"{NAME}.gz")
    store = open_store(two_forms.url)
    assert set((await store.load()).payload) == set(TWO)
    await store.mark(fingerprint(TWO))
    assert two_forms.get() == document.text(TWO)


async def test_the_compressed_form_alone_is_a_document_too(two_forms, open_store):
    """As if the plain one was removed, or its first writer was killed before it."""
    two_forms.put(document.compressed(document.text(TWO)), f"{NAME}.gz")
    store = open_store(two_forms.url)
    assert set((await store.load()).payload) == set(TWO)
    await store.mark(fingerprint(TWO))
    assert two_forms.get() == document.text(TWO)


async def test_unusable_items_are_told_and_replaced(place, open_store):
    """The others are used."""
    place.put(b'{"flags":{"lamp":{"version":"x"},"other":{"key":"other","version":1}}}')
    store = open_store(place.url)
    stored = await store.load()
    assert [bad.key for bad in stored.invalid] == ["lamp"]
    assert await store.upsert([flag("lamp", 1)])
    assert set(json.loads(place.get())["flags"]) == {"lamp", "other"}


async def test_damage_is_logged_once(place, open_store, caplog):
    """With the place and the reason."""
    place.put(b"<html>")
    store = open_store(place.url)
    for _ in range(3):
        assert await store.load() is None
    [record] = caplog.records
    assert "cannot be used" in record.getMessage()
    assert NAME in record.getMessage()


async def test_a_change_costs_a_key_value_store_two_requests(values, open_store):
    """One asks whether the document still stands, by its ETag; a probe costs one."""
    store = open_store(values.url)
    await store.init(ONE)
    values.requests.clear()
    await store.upsert([flag("lamp", 2)])
    assert values.requests == [("GET", 304), ("PUT", 200)]
    await store.mark(fingerprint(TWO))
    values.requests.clear()
    assert await store.holds(fingerprint(TWO))
    assert values.requests == [("GET", 304)]


async def test_nothing_is_written_if_nothing_is_newer(values, open_store):
    """Not even asked."""
    store = open_store(values.url)
    await store.init(TWO)
    values.requests.clear()
    assert await store.upsert([flag("lamp", 2), segment("crowd", 1)])
    assert values.requests == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "the token is missing, wrong, or not permitted"),
        (403, "the token is missing, wrong, or not permitted"),
        (429, "too many requests"),
        (500, "HTTP status 500"),
        (301, "HTTP status 301"),
    ],
)
async def test_each_refusal_of_a_key_value_store_has_a_reason(values, open_store, status, reason):
    """Reading and writing alike; afterwards the document is known to be unknown."""
    store = open_store(values.url)
    await store.init(ONE)
    values.status = status
    for work in (store.load(), store.init(TWO), store.upsert([flag("lamp", 2)])):
        with pytest.raises(StoreUnavailable, match=reason):
            await work
    values.status = 0
    assert await store.upsert([flag("lamp", 2)])
    assert json.loads(values.values[NAME])["flags"]["lamp"]["version"] == 2


async def test_a_race_is_lost_where_the_store_knows_conditions(values, open_store):
    """Between the question and the write somebody else writes."""
    store = open_store(values.url)
    await store.init(ONE)

    def race():
        values.before_put = lambda: None
        values.values[NAME] = document.text(Payload.of([flag("lamp", 7)]))

    values.before_put = race
    assert await store.upsert([flag("lamp", 2), flag("new", 1)])
    flags = json.loads(values.values[NAME])["flags"]
    assert {key: each["version"] for key, each in flags.items()} == {"lamp": 7, "new": 1}


async def test_a_token_goes_only_where_no_user_is_named(values, open_store):
    """A URL with user and password sends these."""
    store = open_store(values.url.replace("://", "://somebody:secret@"))
    with pytest.raises(StoreUnavailable, match="401"):
        await store.load()
    assert "secret" not in f"{store!r}{store.server}{store.label}"


async def test_a_missing_bucket_is_named(s3, open_store):
    store = open_store("s3://no-such-bucket/p")
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        await store.load()


async def test_a_service_that_is_away_has_a_reason(s3, open_store, monkeypatch):
    """And comes back."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match="Could not connect"):
        await open_store("s3://bucket/p").load()


async def test_credentials_that_are_missing_are_told(s3, open_store, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreUnavailable, match="there are no AWS credentials"):
        await open_store("s3://bucket/p").load()


def test_bytes_are_made_once_for_all_places():
    """Payloads with the same items are the same, wherever they come from."""
    renderings = Renderings(shared=True, in_gzip=True)
    first = renderings.of(TWO)
    assert renderings.of(Payload.of(list(TWO)[::-1])) is first
    assert renderings.of(ONE) is not first
    again, _ = ONE.apply(ChangeSet((flag("lamp", 2), segment("crowd", 1))))
    assert renderings.of(again) == first


def test_bytes_are_not_kept_for_one_place():
    renderings = Renderings(shared=False, in_gzip=False)
    assert renderings.of(TWO) is not renderings.of(TWO)
    assert list(renderings.of(TWO)) == [False]


async def test_a_filtered_variant_has_a_document_of_its_own(places, tmp_path):
    """Named in a way that no filter's key can leave the folder."""
    spec = replace(SPEC, payload_filter="../a b")
    [store] = places.stores([f"file://{tmp_path}"], Secret(""), spec, LOG)
    await store.init(Payload.of([Item(Kind.FLAG, "lamp", 1, b'{"version":1}')]))
    assert (tmp_path / "LD-Env-env-1~..%2Fa%20b").exists()


def test_missing_libraries_are_named(monkeypatch):
    """With what to do."""
    monkeypatch.setitem(sys.modules, "relay.stores.documents.s3", None)
    with pytest.raises(ConfigError, match=r"pip install 'relay\[aws\]'"):
        Places(Upstream, urls=["s3://bucket"])
