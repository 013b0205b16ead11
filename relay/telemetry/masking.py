"""Secrets that no log line may contain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

from relay.model.text import one_line

SHORTEST_SECRET = 6
"""Minimum length of a secret that is masked: shorter ones would mask ordinary words."""

_BEGINNING = 4
"""Number of a secret's first characters that are looked for. Keys share theirs (`sdk-`), so a line
without any of them costs the same however many keys there are."""


class SecretMask:
    """Masks secrets wherever they appear in a line, in any spelling."""

    def __init__(self) -> None:
        self._spellings: dict[str, frozenset[str]] = {}
        """Spellings of each secret."""
        self._texts: set[str] = set()
        """All spellings."""
        self._lengths: dict[str, set[int]] = {}
        """Lengths of the spellings by their first characters."""

    @property
    def secrets(self) -> AbstractSet[str]:
        """The texts that are masked: a view."""
        return self._spellings.keys()

    def add(self, secrets: Iterable[str]) -> None:
        """Mask further texts, unless they are too short."""
        for secret in secrets:
            if len(secret) >= SHORTEST_SECRET and secret not in self._spellings:
                self._spellings[secret] = frozenset(_spellings(secret))
                self._search(self._spellings[secret])

    def drop(self, secrets: Iterable[str]) -> None:
        """Stop masking texts."""
        for secret in secrets:
            del self._spellings[secret]
        self._texts, self._lengths = set(), {}
        for spellings in self._spellings.values():
            self._search(spellings)

    def mask(self, line: str) -> str:
        """Return a line with the last characters of each secret in place of it."""
        found: set[str] = set()
        for beginning, lengths in self._lengths.items():
            at = line.find(beginning)
            while at >= 0:
                found.update(line[at : at + length] for length in lengths)
                at = line.find(beginning, at + 1)
        # Longest first: one secret may be the beginning of another.
        for secret in sorted(found & self._texts, key=len, reverse=True):
            line = line.replace(secret, f"...{secret[-4:]}")
        return line

    def _search(self, spellings: Iterable[str]) -> None:
        self._texts.update(spellings)
        for text in spellings:
            self._lengths.setdefault(text[:_BEGINNING], set()).add(len(text))


def _spellings(secret: str) -> Iterator[str]:
    """Yield the spellings of a secret in lines: plain, and escaped by `repr`, text or JSON."""
    for text in (secret, repr(secret)[1:-1]):
        yield from (text, one_line(text), json.dumps(text)[1:-1])
