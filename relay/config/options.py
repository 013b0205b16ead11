"""Form of an option's declaration."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar, cast

from msgspec import Struct, defstruct
from msgspec.structs import replace

from relay.config.types import OptionType

S = TypeVar("S", bound=Struct)


class Support(Enum):
    """Level of support for an option in this release."""

    FULL = "full"
    LATER = "later"
    """Accepted, but the feature answers 503 or has no effect yet; a warning at startup says so."""
    REFUSED = "refused"
    """Setting it keeps the relay from starting, because ignoring it would be wrong."""
    NO_EFFECT = "no effect"
    """Accepted for compatibility, but meaningless here; its help says why."""


class Option(Struct, frozen=True):
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
    name: str = "",
    support: Support = Support.FULL,
) -> Any:
    """Declare an option as an attribute of its section."""
    return Option("", "", name, variable, option_type, default, help_text, example, support)


def section(cls: type[S]) -> type[S]:
    """Make a section of a Struct whose defaults are declarations: a subclass with plain defaults.

    A dataclass could hold the declarations itself, but each adds a millisecond to every start.
    """
    declared = dict(zip(cls.__struct_fields__, cls.__struct_defaults__, strict=True))
    options = {name: each for name, each in declared.items() if isinstance(each, Option)}
    made: Any = defstruct(
        cls.__name__,
        [(name, Any, option.default) for name, option in options.items()],
        bases=(cls,),
        namespace={"__doc__": cls.__doc__, "options": options},
        module=cls.__module__,
        frozen=True,
    )
    return cast("type[S]", made)


LATER, REFUSED, NO_EFFECT = Support.LATER, Support.REFUSED, Support.NO_EFFECT


def declared(name: str, cls: Any) -> tuple[Option, ...]:
    """Return the options of a section, in the order of its class."""
    return tuple(
        replace(
            option, section=name, attribute=attribute, name=option.name or camel_case(attribute)
        )
        for attribute, option in cls.options.items()
    )


def camel_case(attribute: str) -> str:
    """Return the name of an attribute in the file: `stream_uri` becomes `streamUri`."""
    first, *rest = attribute.split("_")
    return first + "".join(word.capitalize() for word in rest)
