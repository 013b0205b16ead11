"""Visibility of flags to the kinds of SDK (evaluation 6.1)."""

from __future__ import annotations

from enum import Enum

from msgspec import UNSET

from relay.model.flag import Flag


class SDKKind(Enum):
    """The kind of SDK that requests results, by its credential."""

    SERVER = "server"
    MOBILE = "mobile"
    BROWSER = "browser"

    __hash__ = object.__hash__  # Enum's own costs as much as several dict lookups

    def sees(self, flag: Flag) -> bool:
        """Return whether a flag is visible to this kind of SDK.

        Without `clientSideAvailability`, a flag is visible to mobile SDKs, and to browsers if the
        older `clientSide` says so.
        """
        if self is SDKKind.SERVER:
            return True
        availability = flag.client_side_availability
        if self is SDKKind.MOBILE:
            return availability is None or availability.using_mobile_key
        if availability is None:
            return flag.client_side is not UNSET and bool(flag.client_side)
        return availability.using_environment_id
