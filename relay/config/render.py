"""Render the effective configuration, and the documentation of all options. Pure.

`relay check` prints `effective`. `scripts/write-options` writes `reference` to `config/relay.conf`
and `table` to `docs/configuration.md`; a test compares them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import structs

from relay.config.checks import ENVIRONMENT, FILTERS
from relay.config.options import Option, Support
from relay.config.schema import NAMED_SECTIONS, SECTIONS, Config, Redis, Webhook, options
from relay.config.types import (
    BOOLEAN,
    COUNT,
    DOCUMENT_URI,
    DOCUMENT_URIS,
    DURATION,
    HTTP_URI,
    REDIS_URIS,
    URI,
)
from relay.model.credential import Secret, masked, masked_url
from relay.model.text import one_line
from relay.protocol.redisurl import masked_redis_urls, redis_urls

MASK = "********"

SHORTEST_MASKED_KEY = 12
"""Minimum length of a key whose last four characters are shown, as in logs; of a shorter key they
would reveal too much."""

_WIDTH = 100
_NOTE_COLUMN = 48
"""Column where the comments of `effective` begin, if the line is short enough."""

_URIS = (URI, HTTP_URI, DOCUMENT_URI)

_KEYS = ("sdk_key", "mobile_key")
"""Secrets that people recognise by their last characters, from logs and dashboards."""

_CLASSES = SECTIONS | NAMED_SECTIONS
_ORDER = ("Main", ENVIRONMENT, *(section for section in SECTIONS if section != "Main"), FILTERS)
"""All sections, in the order of the documentation."""

_EXAMPLE_NAMES = {ENVIRONMENT: "Production", FILTERS: "shop"}
_PLACEHOLDERS = {ENVIRONMENT: "NAME", FILTERS: "PROJKEY"}

_INTRODUCTION = r"""# Configuration file of Relay, with every option.
#
# All options are commented out. Each shows its default, or an example if it has none.
#
#   relay --config FILE              reads a file
#   relay --from-env                 reads environment variables
#   relay --config FILE --from-env   reads both; environment variables override the file
#
# Without either flag, /etc/ld-relay.conf is read, or the environment variables if that file does
# not exist. `relay check` with the same arguments prints the effective configuration, or everything
# that is wrong with it.
#
# Syntax:
#
#   * `[Section]` or `[Section "Name"]`, followed by lines of the form `option = value`. Only quoted
#     names are case-sensitive. A section may occur more than once.
#   * `#` and `;` begin a comment; `//` does not. A value that contains one of them must be quoted;
#     between quotation marks, \" \\ \n and \t stand for a quotation mark, a backslash, a line feed
#     and a tab.
#   * boolean: true, yes, on or 1; false, no, off or 0. An option without `=` is true.
#   * duration: numbers with the units ns, us, ms, s, m and h, such as 30s or 1m30s.
#   * size: numbers with the units B, KiB, MiB, GiB, such as 64KiB.
#   * list: values separated by commas. If a list is set more than once, in the file or by a
#     variable, the values are combined. For any other option, the last value wins.
#
# Keys, secrets and URLs can be read from a file: `sdkKeyFile = PATH` in place of `sdkKey`, and the
# variable LD_ENV_Production_FILE=PATH in place of LD_ENV_Production. Both at once are an error.
#
# Variables accept the same values, except `on` and `off`. An empty variable unsets the value from
# the file; for booleans and lists, it is ignored.
#
# Whitespace, line ends, byte order marks and the like are stripped from a value, and from each
# value of a list; so are quotation marks around a variable's value, except in text and secrets.
# (A password that begins or ends with a space can be set in a URL, as %20.) Anything misspelled,
# misplaced or malformed keeps the relay from starting, and is reported with its line or variable,
# such as a key that contains a space, an origin that no browser sends, or text that is not UTF-8.
# Variables that Kubernetes sets for services, such as PROMETHEUS_PORT=tcp://10.0.0.1:9090, are
# ignored.
"""

_NOTES = {
    Support.FULL: "",
    Support.LATER: "Accepted, but takes effect only in a later release.",
    Support.REFUSED: "Not supported in this release: the relay refuses to start with it.",
    Support.NO_EFFECT: "Accepted for compatibility; has no effect.",
}


def effective(config: Config) -> str:
    """Return the effective configuration in the syntax of a file, with secrets masked.

    Options that were set carry their source, defaults are commented out, warnings come last.
    """
    number, variants = len(config.environments), len(config.all_environments)
    count = f"{number} environment{'s' * (number != 1)}"
    if variants > number:
        count += f" and {variants - number} filtered"
    if config.auto_config.key:
        count = "the environments that LaunchDarkly names"
    lines = [
        f"# The configuration in force, with {count}. What was given stands with its",
        "# source; lines that begin with # show defaults.",
    ]
    for section, values in _sections(config):
        block = list(_lines(config, section, None, values))
        lines += ["", f"[{section}]", *block] if block else []
    if config.uses_launchdarkly:
        lines += ["", *_upstream_lines(config)]
    if config.redis is None:
        lines += ["", "# [Redis] is not used."]
    for each in config.environments:
        name = f" {_subsection(each.name)}" if each.name else ""
        lines += ["", f"[{ENVIRONMENT}{name}]", *_lines(config, ENVIRONMENT, each.name, each)]
    for project, filters in config.filters.items():
        header = f"[{FILTERS} {_subsection(project)}]"
        lines += ["", header, *_lines(config, FILTERS, project, filters)]
    lines += ["", *(f"# Warning: {warning}" for warning in config.warnings)]
    return "\n".join(map(one_line, lines)).rstrip("\n") + "\n"


def _upstream_lines(config: Config) -> Iterator[str]:
    """Yield comments about the way in which flags come."""
    main, by_option = config.main, "([Main] dataSystem)"
    polls = f"polls of baseUri every {main.poll_interval:g} s"
    if main.data_system == "fdv1":
        way = polls if main.data_source == "polling" else "a stream of streamUri"
        yield f"# Flags come by FDv1 {by_option}: {way}, which begins with everything."
        return
    ways = polls
    if main.data_source != "polling":
        ways = f"a poll of baseUri, then a stream of streamUri; {polls} while that fails"
    yield f"# Flags come by FDv2 {by_option}: {ways}."
    yield "# They come by FDv1 instead while upstream asks for it, or does not know FDv2."
    if any(each.filter_key for each in config.all_environments):
        yield "# So do filtered environments if upstream filters: LaunchDarkly does by FDv1 only."
    if config.fleet.enabled:
        yield "# In the fleet only the leader asks; the others follow it by Redis."


def secrets(config: Config) -> tuple[str, ...]:
    """Return every secret that must not be printed: keys and passwords, also those in URLs."""
    texts: list[str] = []
    named = [(ENVIRONMENT, each) for each in config.environments]
    for section, values in (*_sections(config), *named):
        for option in options(section):
            value = getattr(values, option.attribute)
            if isinstance(value, Secret) and value:
                texts.append(value.reveal())
                if isinstance(values, Webhook):
                    texts += (secret.reveal() for secret in values.secrets)
            elif option.type in (URI, HTTP_URI) and value:
                texts += _url_secrets(value)
            elif option.type is REDIS_URIS:
                texts += (text for url in redis_urls(value) for text in _url_secrets(url))
            elif option.type in (DOCUMENT_URI, DOCUMENT_URIS):
                urls = (value,) if isinstance(value, str) else value
                texts += (text for url in urls for text in _document_url_secrets(url))
    return tuple(dict.fromkeys(texts))


def quoted(text: str) -> str:
    """Return a value quoted for a file, if it needs quotes."""
    if re.fullmatch(r"(?![ \t])[^\"\\#;\n\r\t]+(?<![ \t])", text):
        return text
    for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(char, escaped)
    return f'"{text}"'


def _sections(config: Config) -> Iterator[tuple[str, object]]:
    """Yield the unnamed sections that are in use."""
    in_use = {name.replace("_", ""): value for name, value in structs.asdict(config).items()}
    for section in SECTIONS:
        values = in_use.get(section.lower())
        if values is not None:
            yield section, values


def _lines(config: Config, section: str, name: str | None, values: object) -> Iterator[str]:
    """Yield a line for each option that was set, and for each other one that has an effect."""
    label = section if name is None else f'{section} "{name}"'
    sources = dict(config.sources)
    skipped: tuple[str, ...] = ()
    if isinstance(values, Redis) and values.sentinels:
        skipped = ("url", "host", "port")
    elif isinstance(values, Redis) and f"{label}.url" not in sources:
        # Host and port were merged into the URL; all three together would be rejected.
        skipped = ("host", "port")
        labels = [f"{label}.{attribute}" for attribute in skipped]
        url_sources = dict.fromkeys(sources[each] for each in labels if each in sources)
        sources[f"{label}.url"] = ", ".join(url_sources)
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
    """Return a value in the syntax of a file, with secrets masked."""
    if _is_unset(option, value):
        return ""
    if option.attribute in _KEYS and len(value.reveal()) >= SHORTEST_MASKED_KEY:
        return masked(value.reveal())
    if option.type in _URIS:
        return quoted(masked_url(value, MASK))
    if option.type is REDIS_URIS:
        return quoted(masked_redis_urls(value, MASK))
    if option.type is DOCUMENT_URIS:
        return quoted(",".join(masked_url(url, MASK) for url in value))
    return quoted(option.type.show(value))


def _is_unset(option: Option, value: object) -> bool:
    """Return whether a value means "not set"."""
    return value is None or (not value and option.type not in (BOOLEAN, COUNT, DURATION))


def _url_secrets(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    in_query = (value for name, value in parse_qsl(parts.query) if "password" in name.lower())
    # Redis takes user information without a colon for a password.
    userinfo = parts.username if parts.password is None else None
    for password in (parts.password or userinfo or "", *in_query):
        if password:
            yield from (password, unquote(password))


def _document_url_secrets(url: str) -> Iterator[str]:
    """Yield also the values of the query: in presigned URLs these are signatures and tokens."""
    yield from _url_secrets(url)
    for part in urlsplit(url).query.split("&"):
        value = part.partition("=")[2]
        if value and "{key}" not in value:
            yield from (value, unquote(value))


def _subsection(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def reference() -> str:
    """Return the text of `config/relay.conf`: every option with its documentation."""
    blocks = [_INTRODUCTION]
    refused = [section for section in _ORDER if _is_refused(section)]
    for section in (s for s in _ORDER if s not in refused):
        blocks += _section_blocks(section, _shared_note(section))
    text = "Not supported in this release: the relay refuses to start if one of these is used."
    blocks.append(f"#{'-' * (_WIDTH - 1)}\n{_comment(text)}\n")
    for section in refused:
        blocks += _section_blocks(section, "")
    return "\n".join(blocks)


def _section_blocks(section: str, note: str) -> Iterator[str]:
    """Yield the header of a section, then its options."""
    cls = _CLASSES[section]
    summary = inspect.cleandoc(cls.__doc__ or "").partition(": ")[2]
    summary = " ".join(summary.split())
    text = f"{summary[:1].upper()}{summary[1:]} {note}".strip()
    header = f"[{section}]"
    if section in NAMED_SECTIONS:
        header = f'#[{section} "{_EXAMPLE_NAMES[section]}"]'
    yield f"\n{_comment(text)}\n{header}\n"
    for option in options(section):
        own_note = "" if note or _is_refused(section) else _NOTES[option.support]
        name = _EXAMPLE_NAMES.get(section, "")
        facts = [option.type.name, f"default {_default(option) or 'none'}"]
        facts += [f"variable {option.variable}{name}"] if option.variable else ["no variable"]
        description = f"{option.help} {own_note}".strip()
        example = _default(option) or quoted(option.example)
        yield f"{_comment(description)}\n{_comment('; '.join(facts))}\n#{option.name} = {example}\n"


def _comment(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# "))


def _default(option: Option) -> str:
    """Return the default in the syntax of a file; empty if the option is not set by default."""
    unset = _is_unset(option, option.default)
    return "" if unset else quoted(option.type.show(option.default))


def _is_refused(section: str) -> bool:
    """Return whether the section is useless because the options that enable it are refused."""
    support = {option.support for option in options(section)}
    return Support.REFUSED in support and Support.FULL not in support


def _shared_note(section: str) -> str:
    """Return the support note that applies to all options of a section; empty if they differ."""
    support = {option.support for option in options(section)}
    return _NOTES[support.pop()] if len(support) == 1 else ""


def table() -> str:
    """Return the table of options for the docs, followed by the unsupported ones."""
    lines = ["| option | variable | type | default | meaning |", "|---|---|---|---|---|"]
    for section in _ORDER:
        rows = [option for option in options(section) if option.support is Support.FULL]
        if rows:
            name = _PLACEHOLDERS.get(section)
            label = f'[{section} "{name}"]' if name else f"[{section}]"
            lines.append(f"| **`{label}`** | | | | |")
        lines += [_row(option) for option in rows]
    lines += ["", *_rest()]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    name = _PLACEHOLDERS.get(option.section, "")
    default = f"`{_default(option)}`" if _default(option) else "–"
    variable = f"`{option.variable}{name}`" if option.variable else "–"
    return f"| `{option.name}` | {variable} | {option.type.name} | {default} | {option.help} |"


def _rest() -> Iterator[str]:
    """Yield a list item per level of support other than `FULL`."""
    refused = [section for section in _ORDER if _is_refused(section)]
    texts = {
        Support.LATER: "Accepted, but take effect only in a later release (a warning at startup"
        " names those that are set)",
        Support.NO_EFFECT: "Accepted for compatibility, without effect (a warning at startup says"
        " why)",
        Support.REFUSED: "Not supported: the relay refuses to start and names the option",
    }
    for support, text in texts.items():
        parts = []
        for section in _ORDER:
            names = [f"`{o.name}`" for o in options(section) if o.support is support]
            if section in refused:
                parts += [f"all of `[{section}]`"] if support is Support.REFUSED else []
            elif names:
                parts.append(f"`[{section}]` {' '.join(names)}")
        if parts:
            yield f"* {text}: {'; '.join(parts)}."
