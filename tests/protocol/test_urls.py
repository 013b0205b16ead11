import gzip

import pytest
from isal import isal_zlib

from relay.protocol.gzip import CORRUPT, GZIP
from relay.protocol.urls import data_url, join, transfer_url


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("https://sdk.launchdarkly.com", "https://sdk.launchdarkly.com/all"),
        ("http://host:8030/", "http://host:8030/all"),
        ("http://host/prefix/", "http://host/prefix/all"),
    ],
)
def test_a_path_is_joined_to_a_base_that_may_have_one(base, url):
    """There is one slash between them."""
    assert join(base, "/all") == url


@pytest.mark.parametrize(
    ("key", "query"),
    [
        ("", ""),
        ("north", "?filter=north"),
        ("a b", "?filter=a+b"),
        ("x/y", "?filter=x%2Fy"),
        ("p%41", "?filter=p%2541"),
        ("q&r=s", "?filter=q%26r%3Ds"),
        ("n+m", "?filter=n%2Bm"),
        ("ü", "?filter=%C3%BC"),
    ],
)
def test_a_payload_filter_is_form_encoded(key, query):
    """As ld-relay sends it."""
    assert data_url("http://host/", "/all", key) == f"http://host/all{query}"


@pytest.mark.parametrize(
    ("basis", "payload_filter", "query"),
    [
        ("", "", ""),
        ("(p:x:1)", "", "?basis=%28p%3Ax%3A1%29"),
        ("", "a b", "?filter=a+b"),
        ("a&b/c", "north", "?filter=north&basis=a%26b%2Fc"),
    ],
)
def test_a_basis_is_quoted(basis, payload_filter, query):
    """It is upstream's text, so it may have any character."""
    url = transfer_url("http://host/", "/sdk/poll", basis, payload_filter)
    assert url == f"http://host/sdk/poll{query}"


def test_the_constants_of_gzip_fit_the_library():
    """A stream is read with them, and a corrupt one raises the exception."""
    text = gzip.compress(b"text")
    assert isal_zlib.decompress(text, GZIP) == b"text"
    with pytest.raises(CORRUPT):
        isal_zlib.decompress(b"x" + text[1:], GZIP)
