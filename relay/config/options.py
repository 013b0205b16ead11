"""Form of an option's declaration."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

from relay.config.types import OptionType


class Support(Enum):
    """Level of support for an option in this release."""

    FULL = "full"
    LATER = "later"
    """Accepted, but the feature answers 503 or has no effect yet; a warning at startup says so."""
    REFUSED = "refused"
    """Setting it keeps the relay from starting, because ignoring it would be wrong."""
    NO_EFFECT = "no effect"
    """Accepted for compatibility, but meaningless here; its help says why."""


@dataclass(frozen=True, slots=True)
class Option:
    """Declaration of an option.

    Args:
        section: section of the file.
        attribute: attribute of the section's class.
        name: name in the file.
        variable: environment variable, ending in `_` if the name of an environment follows; empty
            if there is none.
        type: parses and formats the value.
        default: value if the option is not set.
        help: one or two sentences for operators.
        example: sample value, as an operator would write it; shown if there is no default.
        support: level of support in this release.
    """

    section: str
    attribute: str
    name: str
    variable: str
    type: OptionType
    default: Any
    help: str
    example: str
    support: Support


def option(
    variable: str,
    option_type: OptionType,
    default: Any,
    help_text: str,
    example: str = "",
    *,
    name: str | None = None,
    support: Support = Support.FULL,
) -> Any:
    """Declare an option as a field of its section."""
    metadata = {"variable": variable, "type": option_type, "help": help_text, "example": example}
    return field(default=default, metadata={**metadata, "name": name, "support": support})


LATER, REFUSED, NO_EFFECT = Support.LATER, Support.REFUSED, Support.NO_EFFECT


def declared(section: str, cls: type) -> tuple[Option, ...]:
    """Return the options of a section, in the order of its class."""
    return tuple(_declared(section, each) for each in fields(cls) if each.metadata)


def _declared(section: str, declared: Field[Any]) -> Option:
    metadata = declared.metadata
    default = None if declared.default is MISSING else declared.default
    return Option(
        section,
        declared.name,
        metadata["name"] or camel_case(declared.name),
        metadata["variable"],
        metadata["type"],
        default,
        metadata["help"],
        metadata["example"],
        metadata["support"],
    )


def camel_case(attribute: str) -> str:
    """Return the name of an attribute in the file: `stream_uri` becomes `streamUri`."""
    first, *rest = attribute.split("_")
    return first + "".join(word.capitalize() for word in rest)
