"""URLs of LaunchDarkly's services."""

from __future__ import annotations


def join(base: str, path: str) -> str:
    """Return the URL of a path below a base, which may have a path of its own.

    Args:
        base: base URL, such as `https://sdk.launchdarkly.com` or `http://host/prefix/`.
        path: path with a leading `/`.
    """
    return base.rstrip("/") + path
