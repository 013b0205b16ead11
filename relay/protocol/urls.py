"""URLs of LaunchDarkly's services."""

from __future__ import annotations

from urllib.parse import quote_plus


def join(base: str, path: str) -> str:
    """Return the URL of a path below a base, which may have a path of its own.

    Args:
        base: base URL, such as `https://sdk.launchdarkly.com` or `http://host/prefix/`.
        path: path with a leading `/`.
    """
    return base.rstrip("/") + path


def data_url(base: str, path: str, payload_filter: str) -> str:
    """Return the URL of an environment's data, or of the part that a payload filter lets through.

    Args:
        base: base URL.
        path: path with a leading `/`.
        payload_filter: key of the filter; empty for all data.
    """
    query = f"?filter={quote_plus(payload_filter)}" if payload_filter else ""
    return join(base, path) + query
