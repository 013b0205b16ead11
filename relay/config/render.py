"""The configuration as text: what is in force, and all there is. Pure.

`relay check` prints `effective`. `config/relay.conf` is `reference`, and the table of the README
is `table`; both are written by `scripts/write-options`, and a test compares them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from relay.config.checks import ENVIRONMENT, FILTERS
from relay.config.schema import (
    NAMED_SECTIONS,
    SECTIONS,
    Config,
    Option,
    Redis,
    Support,
    Webhook,
    options,
)
from relay.config.types import BOOLEAN, COUNT, DURATION, HTTP_URI, URI
from relay.model.credential import Secret, masked, masked_url
from relay.model.text import one_line

MASK = "********"

SHORTEST_MASKED_KEY = 12
"""Characters from which the last four of a key may be shown, as logs do; of a shorter one they
would tell too much."""

_WIDTH = 100
_NOTE_COLUMN = 48
"""Where the comments of `effective` begin, if there is room."""

_KEYS = ("sdk_key", "mobile_key")
"""Secrets of which people know the end, from logs and dashboards."""

_CLASSES = SECTIONS | NAMED_SECTIONS
_ORDER = ("Main", ENVIRONMENT, *(section for section in SECTIONS if section != "Main"), FILTERS)
"""The sections in the order in which people should read them."""

_EXAMPLE_NAMES = {ENVIRONMENT: "Production", FILTERS: "shop"}

_INTRODUCTION = r"""# The configuration file of Relay, with every option there is.
#
# Each option is commented out and shows its default, or an example where there is none by default.
#
#   relay --config FILE              reads a file,
#   relay --from-env                 reads environment variables,
#   relay --config FILE --from-env   reads both; variables stand above the file.
#
# With neither, /etc/ld-relay.conf is read, or the environment variables if there is no such file.
# `relay check`, with the same arguments, shows what results, or everything that is wrong with it.
#
# What is written in a file:
#
#   * `[Section]` or `[Section "Name"]`, then lines `option = value`. Upper and lower case matter in
#     names between quotation marks only. A section may occur several times.
#   * `#` and `;` begin a comment; `//` does not. A value that contains one of them stands between
#     quotation marks; within these, \" \\ \n and \t are a quotation mark, a backslash, a line feed
#     and a tabulator.
#   * boolean: true, yes, on or 1; false, no, off or 0. An option without `=` is true.
#   * duration: numbers with the units ns, us, ms, s, m and h, such as 30s or 1m30s.
#   * size: numbers with the units B, KiB, MiB, GiB, such as 64KiB.
#   * list: values with commas between them. A list that is given again, there or as a variable,
#     grows. Any other option that is given again replaces what was said before.
#
# A variable takes the same values, but for `on` and `off`. One that is empty takes back what the
# file says, except for booleans and lists, where it says nothing.
#
# Blanks, line ends, byte order marks and the like around a value, and around each value of a list,
# are taken off; so are quotation marks around a variable, except in text and secrets. (A password
# that begins or ends with a blank can be given in a URL, as %20.) Whatever is misspelled, misplaced
# or malformed keeps the relay from starting, and is named with its line or variable: a key with a
# blank in it, an origin that no browser has, text that is not UTF-8. Variables that Kubernetes sets
# for services, such as PROMETHEUS_PORT=tcp://10.0.0.1:9090, do not count.
"""

_NOTES = {
    Support.FULL: "",
    Support.LATER: "Accepted; takes effect in a later release.",
    Support.REFUSED: "Not in this release: the relay refuses to start with it.",
    Support.NO_EFFECT: "Accepted for compatibility; has no effect.",
}


def effective(config: Config) -> str:
    """Return the configuration in force, in the syntax of a file, secrets masked.

    What was given stands with its source; defaults are commented out; warnings come last.
    """
    count = f"{len(config.environments)} environment{'s' * (len(config.environments) != 1)}"
    lines = [
        f"# The configuration in force, with {count}. What was given stands with its",
        "# source; lines that begin with # show defaults.",
    ]
    for section, values in _sections(config):
        block = list(_lines(config, section, None, values))
        lines += ["", f"[{section}]", *block] if block else []
    if config.redis is None:
        lines += ["", "# [Redis] is not used."]
    for each in config.environments:
        name = f" {_subsection(each.name)}" if each.name else ""
        lines += ["", f"[{ENVIRONMENT}{name}]", *_lines(config, ENVIRONMENT, each.name, each)]
    lines += ["", *(f"# Warning: {warning}" for warning in config.warnings)]
    return "\n".join(map(one_line, lines)).rstrip("\n") + "\n"


def secrets(config: Config) -> tuple[str, ...]:
    """Return every text that must not be printed: keys, passwords, also those within URLs."""
    found: list[str] = []
    named = [(ENVIRONMENT, each) for each in config.environments]
    for section, values in (*_sections(config), *named):
        for option in options(section):
            value = getattr(values, option.attribute)
            if isinstance(value, Secret) and value:
                found.append(value.reveal())
                if isinstance(values, Webhook):
                    found += (secret.reveal() for secret in values.secrets)
            elif option.type in (URI, HTTP_URI) and value:
                found += _url_secrets(value)
    return tuple(dict.fromkeys(found))


def quoted(text: str) -> str:
    """Return a value as a file must write it."""
    if re.fullmatch(r"(?![ \t])[^\"\\#;\n\r\t]+(?<![ \t])", text):
        return text
    for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(char, escaped)
    return f'"{text}"'


def _sections(config: Config) -> Iterator[tuple[str, object]]:
    """Yield the sections that count, but for environments."""
    for section in SECTIONS:
        values = getattr(config, section.lower(), None)
        if values is not None:
            yield section, values


def _lines(config: Config, section: str, name: str | None, values: object) -> Iterator[str]:
    """Yield a line for each option that was given, and for each other one that has an effect."""
    label = section if name is None else f'{section} "{name}"'
    sources = dict(config.given)
    skipped: tuple[str, ...] = ()
    if isinstance(values, Redis) and f"{label}.url" not in sources:
        # Host and port have become a URL; all three together would be refused.
        skipped = ("host", "port")
        labels = [f"{label}.{attribute}" for attribute in skipped]
        given = dict.fromkeys(sources[each] for each in labels if each in sources)
        sources[f"{label}.url"] = ", ".join(given)
    for option in options(section):
        source = sources.get(f"{label}.{option.attribute}")
        if option.attribute in skipped or (source is None and option.support is not Support.FULL):
            continue
        line = f"{option.name} = {_value(option, getattr(values, option.attribute))}".rstrip()
        if source is None:
            yield f"# {line}"
        else:
            note = {Support.LATER: ", in a later release", Support.NO_EFFECT: ", without effect"}
            yield f"{line:<{_NOTE_COLUMN}}  # {source}{note.get(option.support, '')}"


def _value(option: Option, value: Any) -> str:
    """Return a value as a file would write it, but for what nobody should see."""
    if _is_unset(option, value):
        return ""
    if option.attribute in _KEYS and len(value.reveal()) >= SHORTEST_MASKED_KEY:
        return masked(value.reveal())
    if option.type in (URI, HTTP_URI):
        return quoted(masked_url(value, MASK))
    return quoted(option.type.show(value))


def _is_unset(option: Option, value: object) -> bool:
    """Whether the value means that there is none."""
    return value is None or (not value and option.type not in (BOOLEAN, COUNT, DURATION))


def _url_secrets(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    in_query = (value for name, value in parse_qsl(parts.query) if "password" in name.lower())
    # What stands alone before the `@` is a password to Redis.
    alone = parts.username if parts.password is None else None
    for password in (parts.password or alone or "", *in_query):
        if password:
            yield from (password, unquote(password))


def _subsection(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def reference() -> str:
    """Return the text of `config/relay.conf`: every option, with all that is to be said of it."""
    blocks = [_INTRODUCTION]
    refused = [section for section in _ORDER if _is_refused(section)]
    for section in (s for s in _ORDER if s not in refused):
        blocks += _section_blocks(section, _shared_note(section))
    text = "Not in this release: the relay refuses to start when one of the following is used."
    blocks.append(f"#{'-' * (_WIDTH - 1)}\n{_comment(text)}\n")
    for section in refused:
        blocks += _section_blocks(section, "")
    return "\n".join(blocks)


def _section_blocks(section: str, note: str) -> Iterator[str]:
    """Yield a section's header, then its options."""
    cls = _CLASSES[section]
    about = inspect.cleandoc(cls.__doc__ or "").partition(": ")[2]
    about = " ".join(about.split())
    text = f"{about[:1].upper()}{about[1:]} {note}".strip()
    header = f"[{section}]"
    if section in NAMED_SECTIONS:
        header = f'#[{section} "{_EXAMPLE_NAMES[section]}"]'
    yield f"\n{_comment(text)}\n{header}\n"
    for option in options(section):
        own = "" if note or _is_refused(section) else _NOTES[option.support]
        name = _EXAMPLE_NAMES.get(section, "")
        facts = [option.type.name, f"default {_default(option) or 'none'}"]
        facts += [f"variable {option.variable}{name}"] if option.variable else ["no variable"]
        about = f"{option.help} {own}".strip()
        example = _default(option) or quoted(option.example)
        yield f"{_comment(about)}\n{_comment('; '.join(facts))}\n#{option.name} = {example}\n"


def _comment(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# "))


def _default(option: Option) -> str:
    """Return the default as a file would write it; nothing if the default is to have none."""
    unset = _is_unset(option, option.default)
    return "" if unset else quoted(option.type.show(option.default))


def _is_refused(section: str) -> bool:
    """Whether all of the section is of no use, because its use is refused."""
    support = {option.support for option in options(section)}
    return Support.REFUSED in support and Support.FULL not in support


def _shared_note(section: str) -> str:
    """Return what is true of all options of the section."""
    support = {option.support for option in options(section)}
    return _NOTES[support.pop()] if len(support) == 1 else ""


def table() -> str:
    """Return the table of the README, and below it what this release does not do."""
    lines = ["| option | variable | type | default | meaning |", "|---|---|---|---|---|"]
    for section in _ORDER:
        rows = [option for option in options(section) if option.support is Support.FULL]
        if rows:
            label = f'[{section} "NAME"]' if section in NAMED_SECTIONS else f"[{section}]"
            lines.append(f"| **`{label}`** | | | | |")
        lines += [_row(option) for option in rows]
    lines += ["", *_rest()]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    name = "NAME" if option.section in NAMED_SECTIONS else ""
    default = f"`{_default(option)}`" if _default(option) else "–"
    variable = f"`{option.variable}{name}`"
    return f"| `{option.name}` | {variable} | {option.type.name} | {default} | {option.help} |"


def _rest() -> Iterator[str]:
    """Yield a paragraph for each way in which options are not in force."""
    refused = [section for section in _ORDER if _is_refused(section)]
    texts = {
        Support.LATER: "Accepted now, in force with a later release (the start names those that"
        " are given)",
        Support.NO_EFFECT: "Accepted for compatibility, without effect (the start says why)",
        Support.REFUSED: "Refused: the relay does not start, and names the option",
    }
    for support, text in texts.items():
        parts = []
        for section in _ORDER:
            names = [f"`{o.name}`" for o in options(section) if o.support is support]
            if section in refused:
                parts += [f"all of `[{section}]`"] if support is Support.REFUSED else []
            elif names:
                parts.append(f"`[{section}]` {' '.join(names)}")
        yield f"* {text}: {'; '.join(parts)}."
