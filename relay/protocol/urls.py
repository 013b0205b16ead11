"""URLs of LaunchDarkly's services."""

from __future__ import annotations

from urllib.parse import quote, quote_plus


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


def transfer_url(base: str, path: str, basis: str, payload_filter: str = "") -> str:
    """Return the URL of what a client misses that has the data of a state (fdv2 13.1).

    Args:
        base: base URL.
        path: path with a leading `/`.
        basis: the state; empty for none.
        payload_filter: key of the filter that lets a part of the data through; empty for all.
    """
    url = data_url(base, path, payload_filter)
    separator = "&" if payload_filter else "?"
    return url + (f"{separator}basis={quote(basis, safe='')}" if basis else "")
