"""The operators of clauses: values that match and values that do not."""

import time

import pytest

from relay.evaluation.operators import MAX_PATTERNS, OPERATORS, regex, timestamp

MATCHES = [
    ("in", "a", "a"),
    ("in", 1, 1.0),
    ("in", True, True),
    ("in", 2**53 + 1, 2**53 + 1),
    ("startsWith", "über", "ü"),
    ("endsWith", "über", "er"),
    ("contains", "über", "be"),
    ("contains", "x", ""),
    ("matches", "über", "^.ber$"),
    ("matches", "naïve 日本", "日"),
    ("matches", "ab", "b"),
    ("matches", "É", r"\p{Lu}"),
    ("matches", "a\nb", "(?m)^b$"),
    ("matches", "HELLO", "(?i)hello"),
    ("matches", "x", "(?P<n>x)"),
    ("matches", "x", "(?<n>x)"),
    ("matches", "", ""),
    ("lessThan", 1, 1.5),
    ("lessThanOrEqual", 1, 1),
    ("greaterThan", 2**53 + 1, 2**53),
    ("greaterThanOrEqual", 1.0, 1),
    ("before", "2024-02-29T23:59:59Z", "2024-03-01T00:00:00Z"),
    ("before", 0, 1),
    ("before", "1970-01-01T00:00:00.000000001Z", "1970-01-01T00:00:00.000000002Z"),
    ("before", "1969-12-31T23:59:59.999Z", 0),
    ("before", "2024-01-01T01:00:00+01:01", "2024-01-01T00:00:00Z"),
    ("after", "2024-01-01T00:00:00-00:01", "2024-01-01T00:00:00Z"),
    ("after", "2024-02-30T00:00:00Z", "2024-02-29T23:59:59Z"),
    ("before", "2024-02-30T00:00:00Z", "2024-03-01T00:00:01Z"),
    ("after", "2024-01-01t1:00:00z", "2024-01-01T00:59:59Z"),
    ("after", "2016-12-31T23:59:60Z", "2016-12-31T23:59:59Z"),
    ("after", "2024-01-01T00:00:01Z trailing", "2024-01-01T00:00:00Z"),
    ("before", "0000-01-01T00:00:00Z", "0001-01-01T00:00:01Z"),
    ("after", 1.9, 0.9),
    ("semVerEqual", "2", "2.0.0"),
    ("semVerEqual", "2.1", "2.1.0+build.007"),
    ("semVerLessThan", "2-beta", "2"),
    ("semVerLessThan", "1.0.0-alpha", "1.0.0-alpha.1"),
    ("semVerLessThan", "1.0.0-alpha.1", "1.0.0-alpha.beta"),
    ("semVerLessThan", "1.0.0-beta.2", "1.0.0-beta.11"),
    ("semVerLessThan", "1.0.0-99", "1.0.0-a"),
    ("semVerGreaterThan", "10.0.0", "9.9.9"),
    ("semVerGreaterThan", "1" * 5000, "9" * 4999),
]
NO_MATCHES = [
    ("in", "a", "A"),
    ("in", 1, "1"),
    ("in", 1, True),
    ("in", False, 0),
    ("in", True, False),
    ("in", 2**53 + 1, 2**53),
    ("in", None, None),
    ("in", [1], [1]),
    ("in", {}, {}),
    ("startsWith", "über", "u"),
    ("startsWith", 12, 1),
    ("contains", ["a"], "a"),
    ("contains", "12", 1),
    ("matches", "a", "("),
    ("matches", "aa", r"(a)\1"),
    ("matches", "a", "(?=a)"),
    ("matches", "a\n", "a$"),
    ("matches", "a\nb", "a.b"),
    ("matches", "\u0661", r"^\d$"),
    ("matches", "é", r"^\w$"),
    ("matches", "a", "a{2000}"),
    ("matches", 1, "1"),
    ("matches", "1", 1),
    ("lessThan", "1", 2),
    ("lessThan", 1, 1),
    ("lessThan", False, 1),
    ("before", True, 2),
    ("before", 0, 0),
    ("before", "2024-01-01", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:00", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:00,5Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:00.1234567890Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01 00:00:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-13-01T00:00:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-32T00:00:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-00T00:00:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T24:00:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:60:00Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:61Z", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:00+01:60", "2025-01-01T00:00:00Z"),
    ("before", "2024-01-01T00:00:00+01:00x", "2025-01-01T00:00:00Z"),
    ("before", "٢٠٢٤-01-01T00:00:00Z", "2025-01-01T00:00:00Z"),
    ("after", 0, "0001-01-01T00:00:00Z"),
    ("semVerEqual", "v2", "2"),
    ("semVerEqual", "02", "2"),
    ("semVerEqual", "2.", "2"),
    ("semVerEqual", "2.0.0.0", "2"),
    ("semVerEqual", "2-01", "2-1"),
    ("semVerEqual", "2-", "2"),
    ("semVerEqual", "2-a..b", "2-a"),
    ("semVerEqual", "2+", "2"),
    ("semVerEqual", "2\n", "2"),
    ("semVerEqual", "\u0662", "2"),
    ("semVerEqual", 2, 2),
]


@pytest.mark.parametrize(("name", "value", "operand"), MATCHES)
def test_matches(name, value, operand):
    """The operator finds that the values match."""
    assert OPERATORS[name](value, operand) is True


@pytest.mark.parametrize(("name", "value", "operand"), NO_MATCHES)
def test_mismatches(name, value, operand):
    """The operator finds that the values do not match, and fails in no other way."""
    assert OPERATORS[name](value, operand) is False


def test_dates_beyond_what_64_bits_hold_wrap_around():
    """Like in ld-relay, a number of milliseconds beyond the year 2262 is long ago."""
    assert OPERATORS["before"](9_300_000_000_000, 0)
    assert timestamp(1e300) == 0


@pytest.mark.parametrize(
    "pattern", ["(x+x+)+y", "(a|aa)+$", "(.*)*=", "((a{0,30}){0,30})", "a" * 5000]
)
def test_hostile_patterns_take_no_time(pattern):
    """No pattern takes more than linear time, whatever the text."""
    started = time.perf_counter()
    OPERATORS["matches"]("x" * 50_000 + "a" * 50_000 + "!", pattern)
    assert time.perf_counter() - started < 2


def test_invalid_patterns_make_no_noise(capfd):
    """An invalid pattern is upstream's; logging it at each evaluation would flood the log."""
    OPERATORS["matches"]("a", "(unclosed and never seen before")
    assert capfd.readouterr() == ("", "")


def test_compiled_patterns_are_bounded():
    """The cache of patterns is bounded."""
    for number in range(MAX_PATTERNS + 10):
        regex(f"{number}")
    assert regex.cache_info().currsize == MAX_PATTERNS
