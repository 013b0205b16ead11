"""Credentials and secrets print masked."""

import pytest

from relay.model.credential import MobileKey, SDKKey, Secret, masked_url, obscured


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("sdk-def01234-56-789abc", "sdk-********-**-*89abc"),
        ("sdk-98e2b0b4-2688-4a59-9810-1e0e3d799989", "sdk-********-****-****-****-*******99989"),
        ("mob-98e2b0b4-2688-4a59-9810-1e0e3d799989", "mob-********-****-****-****-*******99989"),
        ("sdk-mob-0123456789", "sdk-mob-*****56789"),
        ("0123456789", "*****56789"),
        ("abcd", "abcd"),
        ("abcde", "abcde"),
        ("xyz01234", "xyz01234"),
        ("", ""),
    ],
)
def test_status_shows_the_shape_of_a_key_and_its_end(key, shown):
    """Hexadecimal digits but the last five become stars; a kind prefix stays."""
    assert obscured(key) == shown


@pytest.mark.parametrize(
    "secret",
    [
        Secret("hunter2-hunter2"),
        SDKKey("sdk-hunter2-hunter2"),
        MobileKey("mob-hunter2-hunter2"),
    ],
)
def test_a_secret_never_prints_itself(secret):
    """Neither repr, str nor formatting shows more than the last four characters."""
    for text in (repr(secret), str(secret), f"{secret}", repr([secret])):
        assert "hunter" not in text


def test_keys_of_different_kinds_are_different_credentials():
    """A mobile key that has the text of an SDK key is not that SDK key."""
    assert SDKKey("x") != MobileKey("x")


def test_a_secret_is_revealed_on_request_only():
    """An empty one is false."""
    assert Secret("hunter2").reveal() == "hunter2"
    assert Secret("hunter2")
    assert not Secret("")


def test_log_lines_show_the_end_of_a_key():
    """Dots and four characters; `/status` shows its shape, too."""
    assert SDKKey("sdk-0123456789").masked == "...6789"
    assert SDKKey("sdk-0123456789").obscured == "sdk-*****56789"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:1/path", "http://host:1/path"),
        ("redis://user:pass@host:1/0", "redis://user:*@host:1/0"),
        ("redis://pass@host", "redis://*@host"),
        ("redis://:pass@host", "redis://:*@host"),
        ("redis://@host", "redis://@host"),
        ("http://host/?token=a&b=c&d", "http://host/?token=*&b=*&d"),
        ("redis://user:pa/ss@host", "redis://*"),
        ("redis://user:pa?ss@host", "redis://*"),
        ("redis://user:pa#ss@host", "redis://*"),
    ],
)
def test_a_url_shows_no_password(url, shown):
    """Nor values of the query; if a password may begin anywhere, nothing but the scheme."""
    assert masked_url(url, "*") == shown
