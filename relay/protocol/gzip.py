"""What isal's decompressor wants to know, and what it raises."""

from __future__ import annotations

from typing import cast

from isal import isal_zlib

GZIP = 31
"""The decompressor's number for a gzip stream."""

CORRUPT = cast("type[Exception]", isal_zlib.error)  # which its stubs take for an instance
"""What decompressing raises."""
