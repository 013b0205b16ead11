"""URLs of documents, and what is shown of them."""

from __future__ import annotations

import pytest

from relay.stores.documents.location import Location

NAME = "LD-Env-id~a%2Fb"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///srv/flags", f"/srv/flags/{NAME}"),
        ("file:///srv/flags/", f"/srv/flags/{NAME}"),
        ("FILE:///srv/flags", f"/srv/flags/{NAME}"),
        ("file:///srv/my%20flags/{key}.json", f"/srv/my flags/{NAME}.json"),
        ("s3://bucket", NAME),
        ("s3://bucket/", NAME),
        ("s3://bucket/a/b", f"a/b/{NAME}"),
        ("s3://bucket/a/{key}/flags", f"a/{NAME}/flags"),
    ],
)
def test_documents_lie_below_the_url_or_where_the_key_stands(url, path):
    """In folders and buckets both forms of the document are published; the plain one counts."""
    compressed, plain = Location.all_of(url, NAME)
    assert (plain.path, plain.in_gzip) == (path, False)
    assert compressed.in_gzip
    assert compressed.path == f"{path}.gz"
    assert Location.of(url, NAME) == plain


@pytest.mark.parametrize(
    "url", ["file:///srv/{key}.gz", "s3://bucket/{key}.gz", "https://h/{key}.gz"]
)
def test_a_url_may_ask_for_gzip_only(url):
    [only] = Location.all_of(url, NAME)
    assert only.in_gzip


def test_a_key_value_store_gets_one_form():
    """Its readers decompress nothing."""
    [only] = Location.all_of("https://h/v/{key}?ttl=5", NAME)
    assert only.url == f"https://h/v/{NAME}?ttl=5"
    assert not only.in_gzip


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("https://me:secret@h/{key}", "https://me:********@h/LD-Env-a"),
        (
            "https://h/{key}?X-Amz-Signature=abc&x=1",
            "https://h/LD-Env-a?X-Amz-Signature=********&x=********",
        ),
        ("s3://bucket/p", "s3://bucket/p/LD-Env-a"),
    ],
)
def test_secrets_are_masked(url, masked):
    """Passwords, and all that is in a query: presigned URLs have their signatures there."""
    assert Location.of(url, "LD-Env-a").masked == masked
