"""Items are read from databases whoever has written them."""

from __future__ import annotations

import pytest

from relay.stores import UNREADABLE, Version
from relay.stores.items import version_of


@pytest.mark.parametrize(
    ("stored", "version"),
    [
        (b'{"version":7,"on":true}', Version(7, live=True)),
        (b'{"version":7,"deleted":true}', Version(7, live=False)),
        (b'{"version":7.0}', Version(7, live=True)),  # other programs may write it so
        (b'{"key":"x"}', Version(0, live=True)),
        (b'{"version":"7"}', UNREADABLE),
        (b'{"version":1e999}', UNREADABLE),
        (b"nonsense", UNREADABLE),
        (b"\xff", UNREADABLE),
        (b"[" * 100_000, UNREADABLE),
    ],
)
def test_versions_are_read_of_whatever_is_stored(stored, version):
    """What cannot be read is older than anything."""
    assert version_of(stored) == version
