"""Secrets in lines are masked, wherever they stand."""

import pytest

from relay.telemetry.masking import SecretMask


def masked(line: str, *secrets: str) -> str:
    mask = SecretMask()
    mask.add(secrets)
    return mask.mask(line)


@pytest.mark.parametrize("template", ["{}", "{} b", "a {}", "a{}b", "{0} {0}", "{0}{0}", "sdk-{}"])
def test_a_secret_is_masked_anywhere(template: str) -> None:
    """At the ends of a line, within words, several times, and behind its own beginning."""
    assert masked(template.format("sdk-secret-abcd"), "sdk-secret-abcd") == template.format(
        "...abcd"
    )


def test_the_longest_secret_wins() -> None:
    """If one is the beginning, the end or a part of another, nothing of that shows."""
    secrets = ("sdk-secret-1", "sdk-secret-11", "xsdk-secret-11", "dk-secret")
    assert masked("xsdk-secret-11 sdk-secret-11 sdk-secret-1 dk-secret", *secrets) == (
        "...t-11 ...t-11 ...et-1 ...cret"
    )


def test_what_only_begins_like_a_secret_stays() -> None:
    """A line that ends within a secret, or differs from it, is left alone."""
    for line in ("sdk-", "sdk-secret-abc", "sdk-secret-abcx", "mob-secret-abcd"):
        assert masked(line, "sdk-secret-abcd") == line


def test_a_dropped_secret_shows_and_others_stay_masked() -> None:
    """Even those that begin as it does, or have its length."""
    mask = SecretMask()
    mask.add(["sdk-one-aaaa", "sdk-two-bbbb", "sdk-one-aaaa-cccc"])
    mask.drop(["sdk-one-aaaa"])
    assert mask.secrets == {"sdk-two-bbbb", "sdk-one-aaaa-cccc"}
    assert (
        mask.mask("sdk-one-aaaa sdk-two-bbbb sdk-one-aaaa-cccc") == "sdk-one-aaaa ...bbbb ...cccc"
    )


def test_short_texts_are_ordinary_words() -> None:
    """They are not masked."""
    mask = SecretMask()
    mask.add(["relay", "pretty"])
    assert mask.secrets == {"pretty"}
    assert mask.mask("relay pretty") == "relay ...etty"
