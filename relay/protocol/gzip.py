"""Constants of isal's decompressor."""

from __future__ import annotations

from typing import cast

from isal import isal_zlib

GZIP = 31
"""Window bits for a gzip stream."""

CORRUPT = cast("type[Exception]", isal_zlib.error)  # an instance in its stubs
"""Exception for corrupt input."""
