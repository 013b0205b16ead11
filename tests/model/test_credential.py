"""Credentials and secrets print masked."""

import pytest

from relay.model.credential import MobileKey, SDKKey, Secret, obscured


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
