"""Who may see which flags (evaluation 6.1)."""

from __future__ import annotations

from enum import Enum

from msgspec import UNSET

from relay.model.flag import Flag


class SDKKind(Enum):
    """The kind of credential with which results are asked for."""

    SERVER = "server"
    MOBILE = "mobile"
    BROWSER = "browser"

    __hash__ = object.__hash__  # Enum's own takes as long as several look-ups

    def sees(self, flag: Flag) -> bool:
        """Whether the flag is among the results.

        Without `clientSideAvailability`, mobile SDKs see a flag, and browsers do if the older
        `clientSide` says so.
        """
        if self is SDKKind.SERVER:
            return True
        availability = flag.client_side_availability
        if self is SDKKind.MOBILE:
            return availability is None or availability.using_mobile_key
        if availability is None:
            return flag.client_side is not UNSET and bool(flag.client_side)
        return availability.using_environment_id
