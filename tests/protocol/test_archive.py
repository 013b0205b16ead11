"""Archives: what is read of them, what makes them unusable, and what only spoils one environment."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData, UnusableArchive
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.payload import EMPTY, Payload
from relay.protocol import archive
from relay.protocol.archive import Entry, entry_of, md5, read, write
from relay.protocol.environments import SharedSettings, spec_of
from relay.protocol.fdv1 import parse_archived
from tests.support.data import all_data, flag, segment

ARCHIVES = Path(__file__).parent.parent / "golden" / "archives"
GOOD = (ARCHIVES / "good.tar.gz").read_bytes()
PLAIN = (ARCHIVES / "good.tar").read_bytes()


def entry(name: str = "id", data: str = '{"flags":{}}', **metadata: object) -> Entry:
    environment = {"envID": name, "sdkKey": {"value": f"sdk-{name}"}}
    text = json.dumps({"env": environment, "dataId": "d1", **metadata})
    return Entry(name, text.encode(), data.encode())


def tar(**members: bytes) -> bytes:
    """A plain tar file; `_` in the names of members stands for a dot."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return output.getvalue()


@given(
    st.lists(
        st.builds(
            Entry,
            st.text("abc-é0", min_size=1, max_size=120).filter(lambda n: not n.endswith("-data")),
            st.binary(max_size=2000),
            st.binary(max_size=2000),
        ),
        unique_by=lambda e: e.name,
        max_size=5,
    )
)
def test_what_is_written_is_read_back(entries):
    written = write(entries)
    assert sorted(read(written), key=lambda e: e.name) == sorted(entries, key=lambda e: e.name)
    assert read(gzip.decompress(written)) == read(written)
    assert write(reversed(entries)) == written


def test_data_come_before_metadata_in_the_checksum():
    """In the order of the names of the members, by byte."""
    entries = (Entry("b", b"3", b"2"), Entry("a", b"1", b"0"))
    assert md5(entries) == md5((Entry("x", b"23", b"01"),))


@pytest.mark.parametrize("content", [GOOD, PLAIN])
def test_an_archive_that_is_cut_off_anywhere_is_unusable(content):
    """Half of a file that is being written is never taken for the whole."""
    whole = read(content)
    for size in range(0, len(content), 7):
        try:
            found = read(content[:size])
        except UnusableArchive:
            continue
        assert found == whole  # nothing but the end of the tar file is missing


@given(
    content=st.sampled_from([GOOD, PLAIN]),
    changes=st.lists(st.tuples(st.integers(0, len(PLAIN)), st.integers(0, 255)), max_size=20),
)
def test_whatever_is_spoilt_is_refused_and_raises_nothing_else(content, changes):
    """A header, the compression, the content: the checksum finds it if nothing before does."""
    spoilt = bytearray(content)
    for position, byte in changes:
        spoilt[position % len(spoilt)] = byte
    try:
        found = read(bytes(spoilt))
    except UnusableArchive:
        return
    assert found == read(content)


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_no_archive(content):
    for start in (b"", b"\x1f\x8b\x08"):
        with pytest.raises(UnusableArchive):
            read(start + content)


def test_streams_may_follow_each_other_and_something_else_the_last():
    """As other compressors write them; a download may end with line ends."""
    half = len(PLAIN) // 2
    parts = gzip.compress(PLAIN[:half]) + gzip.compress(PLAIN[half:])
    assert read(parts) == read(parts + b"\n and more") == read(GOOD)


def test_broken_compression_is_named():
    with pytest.raises(UnusableArchive, match="cannot be decompressed"):
        read(GOOD[:100] + b"\xff" * 100 + GOOD[200:])


def test_the_later_of_two_members_counts():
    good = {f"{name}": content for name, content in _members(entry()).items()}
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as file:
        for name, content in [("id.json", b"spoilt"), *good.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    assert read(output.getvalue()) == (entry(),)


def _members(one: Entry) -> dict[str, bytes]:
    return {
        f"{one.name}.json": one.raw_metadata,
        f"{one.name}-data.json": one.raw_data,
        "checksum.md5": md5([one]),
    }


def test_names_are_confined():
    """A path that leads out of the folder is that of the same name in it."""
    one = entry()
    members = {"../" * 3 + name: content for name, content in _members(one).items()}
    assert read(tar(**members)) == (one,)


def test_a_file_in_a_folder_is_refused_by_name():
    with pytest.raises(UnusableArchive, match=r'a file in a folder, "data/id\.json"'):
        read(tar(**{"data/id.json": b""}))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_member_may_have_one_byte_less_than_200_mib(compressed, monkeypatch):
    """Whatever it is for; nobody has to send that much to be refused."""
    header = tarfile.TarInfo("zeros.txt")
    header.size = 209715200
    content = header.tobuf() + bytes(1024)
    text = 'malicious archive file; it contained a file "zeros.txt" with a size >= 209715200 bytes'
    with pytest.raises(UnusableArchive, match=text):
        read(gzip.compress(content) if compressed else content)
    monkeypatch.setattr(archive, "MAX_MEMBER", 5000)
    stray = tar(**{"zeros.txt": bytes(4999)}, **_members(entry()))
    assert read(gzip.compress(stray) if compressed else stray) == (entry(),)
    with pytest.raises(UnusableArchive, match="size >= 5000 bytes"):
        read(tar(**{"zeros.txt": bytes(5000)}))


def test_the_content_of_an_archive_is_limited(monkeypatch):
    """A small file may hold any amount, in members that are small each."""
    monkeypatch.setattr(archive, "MAX_CONTENT", 1_000_000)
    with pytest.raises(UnusableArchive, match="more than 1000000 bytes"):
        read(gzip.compress(tar(**{f"{i}.txt": bytes(10_000) for i in range(120)})))


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (Entry("id", b"no JSON", b"{}"), "metadata: "),
        (Entry("id", b"[]", b"{}"), "metadata: "),
        (Entry("id", b"null", b"{}"), "metadata: "),
        (Entry("id", b"{}", b"{}"), "environment: not a JSON object"),
        (entry(env={"envID": "id"}), "metadata: there is no SDK key"),
        (entry(env={"envID": "other", "sdkKey": {"value": "k"}}), 'the envID is "other"'),
        (entry(dataId=5), "metadata: "),
        (entry(data="no JSON"), "data: JSON is malformed"),
        (entry(data='{"flags":[]}'), "data: "),
        (entry(data='{"flags":{"a":{}'), "data: "),
    ],
)
def test_an_environment_may_be_unusable(spoilt, reason):
    with pytest.raises(InvalidData) as caught:
        _ = (spoilt.metadata(), spoilt.data())
    assert reason in str(caught.value)
    assert read(write([spoilt])) == (spoilt,)


@pytest.mark.parametrize("data", ["null", "{}", '{"flags":null}', '{"news":{"a":5},"segments":{}}'])
def test_kinds_that_are_missing_are_empty(data):
    """An archive is complete; unknown kinds are skipped."""
    changes = entry(data=data).data()
    assert (changes.items, changes.full) == ((), True)


def test_an_unusable_item_spoils_no_other():
    data = '{"flags":{"a":{"key":"a","version":"one"},"b":{"key":"b","version":1}}}'
    changes = entry(data=data).data()
    assert [item.key for item in changes.items] == ["b"]
    assert [item.key for item in changes.invalid] == ["a"]


def payload_of(*items: dict) -> Payload:
    payload, _ = EMPTY.apply(parse_archived(all_data(*items).encode()))
    return payload


def test_equal_payloads_give_equal_entries():
    """In whatever order their items came; an item that differs gives another data ID."""
    spec = EnvironmentSpec("shop", SDKKey("sdk-1"), environment_id=EnvironmentID("id"))
    flags = [flag(f"flag-{i}") for i in range(50)]
    one, other = (entry_of(spec, payload_of(*items)) for items in (flags, reversed(flags)))
    assert one == other
    changed = entry_of(spec, payload_of(*flags[1:], flag("flag-0", 2)))
    assert changed.metadata().data_id != one.metadata().data_id
    assert changed.metadata().environment == one.metadata().environment


def test_an_entry_keeps_what_an_environment_is():
    """All but tombstones; another setting gives another version."""
    spec = EnvironmentSpec(
        "shop",
        SDKKey("sdk-1"),
        MobileKey("mob-1"),
        EnvironmentID("id"),
        secure_mode=True,
        ttl=61,
        project_key="p",
    )
    written = entry_of(spec, payload_of(flag(), flag("gone", deleted=True), segment()))
    assert {item.key for item in written.data().items} == {"lamp", "crowd"}
    given_back = written.metadata().environment
    read_spec = spec_of(given_back, SharedSettings(), 0)
    assert read_spec.credentials == spec.credentials
    assert (read_spec.secure_mode, read_spec.ttl) == (True, 120)
    assert (read_spec.project_key, read_spec.title) == ("p", "p shop")
    other = entry_of(replace(spec, secure_mode=False), EMPTY).metadata().environment
    assert other.version != given_back.version


def test_an_environment_without_an_id_has_no_place_in_an_archive():
    with pytest.raises(ValueError, match='"shop" has no client-side ID'):
        entry_of(EnvironmentSpec("shop", SDKKey("sdk-1")), EMPTY)
