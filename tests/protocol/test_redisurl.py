"""Lists of Redis URLs, and addresses of servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.redisurl import host_and_port, masked_redis_urls, redis_urls


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("redis://a", ["redis://a"]),
        ("redis://a:1,b:2", ["redis://a:1", "redis://b:2"]),
        ("rediss://u:p@a,[::1]:2/0", ["rediss://u:p@a/0", "rediss://u:p@[::1]:2/0"]),
        ("redis://:p,q@a,redis://:r@b", ["redis://:p,q@a", "redis://:r@b"]),
        ("unix:///run/a,b", ["unix:///run/a,b"]),
        ("redis://:pa/ss@a", ["redis://:pa/ss@a"]),
    ],
)
def test_a_list_gives_its_urls(text: str, urls: list[str]) -> None:
    """A comma in a password belongs to it."""
    assert list(redis_urls(text)) == urls


@given(st.text())
def test_a_text_that_is_no_list_stays_as_it_is(text: str) -> None:
    """Errors are found where a URL is used."""
    if "," not in text:
        assert redis_urls(text) == (text,) or "://" not in text


def test_no_password_is_left() -> None:
    """Each URL of a list is masked."""
    shown = masked_redis_urls("redis://:geheim@a:1,b:2,redis://u:hush@c", "xxxxx")
    assert shown == "redis://:xxxxx@a:1,redis://:xxxxx@b:2,redis://u:xxxxx@c"


def test_an_address_has_a_host_and_maybe_a_port() -> None:
    """An IPv6 address stands in brackets."""
    assert host_and_port("a", 7) == ("a", 7)
    assert host_and_port("a:1", 7) == ("a", 1)
    assert host_and_port("[::1]:1", 7) == ("::1", 1)


@pytest.mark.parametrize(
    "text", ["", ":1", "a:b", "a:99999", "a/b", "redis://a", "u@a", "a?b", "[a"]
)
def test_anything_else_is_no_address(text: str) -> None:
    """A URL neither."""
    with pytest.raises(ValueError):
        host_and_port(text, 7)
