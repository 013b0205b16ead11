"""Secrets by reference: variables and options that name a file which holds the value.

`X_FILE` stands for the variable `X`, and `nameFile` for the option `name`, if that is a key, a
secret, or a URL, which may hold a password. Docker and Kubernetes mount secrets as files.
"""

from __future__ import annotations

from pathlib import Path

from relay.config.options import Option
from relay.config.schema import NAMED_SECTIONS, SECTIONS, options
from relay.config.types import PATH, stripped
from relay.model.text import one_line

SUFFIX, FILE_SUFFIX = "_FILE", "file"
"""Ends of variables, and of names in a file in lower case."""

MAX_SIZE = 64 * 1024
"""Maximum size of such a file in bytes. A wrong path may name a large file, or one without end."""


def variable_target(variable: str, value: str) -> tuple[Option, str | None] | None:
    """Return the option that a variable sets by reference, and the environment or project.

    None if it is no reference. An environment may have a name that ends with `_FILE`, so that the
    variable of an environment is one only if its value has a slash, as a path has and no key.

    Args:
        variable: name of the variable.
        value: its value.
    """
    target = variable.removesuffix(SUFFIX)
    if target == variable or not value:
        return None
    unnamed = [option for section in SECTIONS for option in options(section)]
    if any(option.variable == variable for option in unnamed):
        return None
    for option in unnamed:
        if option.variable == target and option.type.by_reference:
            return option, None
    for option in (option for section in NAMED_SECTIONS for option in options(section)):
        name = target.removeprefix(option.variable)
        if option.type.by_reference and name not in (target, "") and "/" in value:
            return option, name
    return None


def file_target(section: str, name: str) -> Option | None:
    """Return the option that a name in a file sets by reference; None if it is no reference.

    Args:
        section: section of the file, as declared.
        name: name as written, which is not the name of an option.
    """
    lower = name.lower()
    target = lower.removesuffix(FILE_SUFFIX)
    if target == lower:
        return None
    found = (o for o in options(section) if o.name.lower() == target and o.type.by_reference)
    return next(found, None)


def label(name: str, path: str) -> str:
    """Return a reference for messages: its name, with the path.

    A text without a slash may be the secret itself, by mistake, and is not shown.
    """
    return one_line(f"{name}={path}") if "/" in path else name


def read_value(path: str) -> str:
    """Return the value in a file, without the blanks and line ends around it.

    Raises:
        ValueError: there is none; the message never repeats the content.
    """
    try:
        with Path(PATH.parse(path)).open("rb") as file:
            content = file.read(MAX_SIZE + 1)
        value = stripped(content.decode())
    except OSError as e:
        raise ValueError(e.strerror or "it cannot be read") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if len(content) > MAX_SIZE:
        raise ValueError(f"longer than {MAX_SIZE} bytes")
    if not value:
        raise ValueError("the file is empty")
    return value
