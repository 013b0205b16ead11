"""File and environment to `Config`: merged first, validated after, all problems at once (config 3).

The environment is a mapping that the caller passes; nothing here reads the process's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from relay.config.schema import (
    NAMED_SECTIONS,
    SECTIONS,
    Config,
    EnvironmentConfig,
    Main,
    Option,
    Redis,
    Support,
    options,
)
from relay.config.syntax import Assignment, FileSyntaxError, parse
from relay.config.values import BOOLEAN, LIST, PATH, SECRET, STRING, file_boolean
from relay.errors import ConfigError

DEFAULT_FILE = "/etc/ld-relay.conf"
ENVIRONMENT = "Environment"
_OLD_BASE_URI = "https://app.launchdarkly.com"
_CLIENT_SIDE_BASE_URI = "https://clientsdk.launchdarkly.com"
_SHORTEST_CLEANUP = 0.1
_SHORTEST_POLL = 1.0
_LATER_SECTIONS = ("DynamoDB", "Consul", "Datadog", "Stackdriver", "OpenTelemetry")
"""Sections of which variables count only once the section is switched on, which is refused."""

Key = tuple[str, str | None, str]
"""Section, name of the subsection, attribute."""


@dataclass(slots=True)
class _Given:
    """What the sources say so far."""

    values: dict[Key, Any] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    names: dict[tuple[str, str], None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, key: Key, option: Option, text: str, source: str) -> None:
        """Take a value over; raises ValueError if it is not one."""
        if option.kind is LIST:
            if text:
                self.values[key] = (*self.values.get(key, ()), *option.kind.parse(text))
        elif text or option.kind in (STRING, PATH, SECRET):
            self.values[key] = option.kind.parse(text)
        else:
            self.values.pop(key, None)
        self.sources[key] = source

    def of(self, section: str, name: str | None) -> dict[str, Any]:
        return {a: v for (s, n, a), v in self.values.items() if (s, n) == (section, name)}


def load(
    config_path: str, from_env: bool, allow_missing_file: bool, environ: Mapping[str, str]
) -> Config:
    """Return the configuration that file and environment give together.

    Args:
        config_path: the file; empty for none, or for the default file if `from_env` is not set.
            Where that is missing as well, the environment is read.
        from_env: read environment variables.
        allow_missing_file: a file that does not exist is no error.
        environ: the environment variables.

    Raises:
        ConfigError: with every problem.
    """
    if not config_path and not from_env:
        from_env = not Path(DEFAULT_FILE).exists()
        config_path = "" if from_env else DEFAULT_FILE
    given = _Given()
    if config_path:
        _read_file(given, config_path, allow_missing_file)
    if from_env:
        _read_environ(given, environ)
    if given.problems:
        raise ConfigError(given.problems)
    return _checked(given)


def _read_file(given: _Given, path: str, allow_missing: bool) -> None:
    try:
        assignments = parse(Path(path).read_bytes().decode())
    except FileNotFoundError:
        if not allow_missing:
            given.problems.append(f'configuration file "{path}" does not exist')
        return
    except FileSyntaxError as e:
        reason = f"{path}:{e.line}:{e.column}: {e}"
    except OSError as e:
        reason = e.strerror or "cannot be read"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    else:
        for each in assignments:
            try:
                _assign(given, each, f"{path}:{each.line}")
            except ValueError as e:
                given.problems.append(f"{path}:{each.line}: {e}")
        return
    given.problems.append(f'failed to read configuration file "{path}": {reason}')


def _assign(given: _Given, assignment: Assignment, source: str) -> None:
    where = f'unsupported or misspelled section "{assignment.section}"'
    known = {name.lower(): name for name in (*SECTIONS, *NAMED_SECTIONS)}
    section = known.get(assignment.section.lower())
    if section is None:
        raise ValueError(where)
    name = assignment.subsection
    if section in NAMED_SECTIONS:
        name = name or ""
        given.names[section, name] = None
    elif name is not None:
        raise ValueError(f'{where}, subsection "{name}"')
    if not assignment.name:
        return
    found = [o for o in options(section) if o.name.lower() == assignment.name.lower()]
    if not found:
        raise ValueError(f'{where}, variable "{assignment.name}"')
    try:
        given.put(
            (section, name, found[0].attribute), found[0], _file_text(found[0], assignment), source
        )
    except ValueError as e:
        raise ValueError(f"{found[0].name}: {e}") from None


def _file_text(option: Option, assignment: Assignment) -> str:
    if option.kind is BOOLEAN:
        value = "true" if assignment.value is None else assignment.value
        return "true" if file_boolean(value) else "false"
    if assignment.value is None:
        raise ValueError("blank value not supported for type")
    return assignment.value


def _read_environ(given: _Given, environ: Mapping[str, str]) -> None:
    for section in SECTIONS:
        for option in options(section):
            gated = section in _LATER_SECTIONS and option.support is not Support.REFUSED
            if option.variable in environ and section != "Redis" and not gated:
                _take(given, (section, None, option.attribute), option, option.variable, environ)
    _read_redis(given, environ)
    for section, prefix in ((ENVIRONMENT, "LD_ENV_"), ("Filters", "LD_FILTER_KEYS_")):
        for name in [v.removeprefix(prefix) for v in environ if v.startswith(prefix)]:
            given.names[section, name] = None
            _read_named(given, section, name, environ)
    if environ.get("EVENTS_SAMPLING_INTERVAL"):
        given.problems.append("EVENTS_SAMPLING_INTERVAL: this variable is no longer supported")
    if _switch(given, environ, "USE_CONSUL"):
        given.values["Consul", None, "host"] = environ.get("CONSUL_HOST") or "localhost"
        given.sources["Consul", None, "host"] = "USE_CONSUL"


def _read_named(given: _Given, section: str, name: str, environ: Mapping[str, str]) -> None:
    for option in options(section):
        variable = option.variable + name
        if option.variable and variable in environ:
            _take(given, (section, name, option.attribute), option, variable, environ)
    old = f"LD_TTL_MINUTES_{name}"
    if section == ENVIRONMENT and environ.get(old):
        reason = f"this variable is no longer supported; use LD_TTL_{name}"
        given.problems.append(f"{old}: {reason}")


def _take(
    given: _Given, key: Key, option: Option, variable: str, environ: Mapping[str, str]
) -> None:
    text = environ[variable]
    if not text and option.kind is BOOLEAN:
        return
    try:
        given.put(key, option, text, variable)
    except ValueError as e:
        given.problems.append(f"{variable}: {e}")


def _switch(given: _Given, environ: Mapping[str, str], variable: str) -> bool:
    try:
        return bool(environ.get(variable)) and bool(BOOLEAN.parse(environ[variable]))
    except ValueError as e:
        given.problems.append(f"{variable}: {e}")
        return False


def _read_redis(given: _Given, environ: Mapping[str, str]) -> None:
    wanted = _switch(given, environ, "USE_REDIS")
    if not wanted and not _redis_enabled(given.of("Redis", None)):
        return
    if environ.get("REDIS_TTL"):
        given.problems.append("REDIS_TTL: this variable is no longer supported; use CACHE_TTL")
    variables = dict(environ)
    port = variables.get("REDIS_PORT", "")
    if port.startswith("tcp://"):
        # Docker links: the variable holds the whole address.
        variables["REDIS_HOST"], _, variables["REDIS_PORT"] = port[6:].rpartition(":")
    for option in options("Redis"):
        if option.variable in variables:
            _take(given, ("Redis", None, option.attribute), option, option.variable, variables)
    if not _redis_enabled(given.of("Redis", None)):
        given.values["Redis", None, "host"] = "localhost"


def _redis_enabled(redis: Mapping[str, Any]) -> bool:
    return any(redis.get(attribute) for attribute in ("url", "host", "port"))


def _checked(given: _Given) -> Config:
    built = {name: cls(**given.of(name, None)) for name, cls in SECTIONS.items()}
    environments = tuple(
        EnvironmentConfig(name=name, **given.of(ENVIRONMENT, name))
        for section, name in given.names
        if section == ENVIRONMENT
    )
    problems = [*_refused(given), *_main_problems(built["Main"])]
    size = given.values.get(("Events", None, "max_inbound_payload_size"))
    if size is not None and size <= 0:
        problems.append("max inbound payload size must be greater than zero")
    problems += [
        f'SDK key is required for environment "{each.name}"'
        for each in environments
        if not each.sdk_key
    ]
    redis, redis_problems = _redis(built["Redis"])
    warnings = _warnings(given)
    if redis is not None:
        bare = [each.name for each in environments if not each.prefix]
        text = 'environment "{}" does not have a prefix specified for database storage'
        if len(environments) > 1:
            problems += [text.format(name) for name in bare]
        else:
            tail = "; this would be an error if multiple environments were configured"
            warnings += [text.format(name) + tail for name in bare]
    problems += redis_problems
    if problems:
        raise ConfigError(problems)
    return Config(
        main=_with_uris(built["Main"]),
        events=built["Events"],
        environments=environments,
        redis=redis,
        proxy=built["Proxy"],
        http=built["Http"],
        webhook=built["Webhook"],
        prometheus=built["Prometheus"],
        given={_label(key): source for key, source in given.sources.items()},
        warnings=tuple(warnings),
    )


def _label(key: Key) -> str:
    section, name, attribute = key
    return f"{section}.{attribute}" if name is None else f'{section} "{name}".{attribute}'


def _written(given: _Given, support: Support) -> Iterable[tuple[Key, Option, str]]:
    """The options of this kind that were given something other than their default."""
    for key, value in given.values.items():
        option = next(o for o in options(key[0]) if o.attribute == key[2])
        if option.support is support and value != option.default:
            yield key, option, f"[{key[0]}] {option.name} ({given.sources.get(key, 'default')})"


def _refused(given: _Given) -> list[str]:
    return [
        f"{shown} is not supported in this release"
        for _, _, shown in _written(given, Support.REFUSED)
    ]


def _warnings(given: _Given) -> list[str]:
    later = [f"{s} takes effect in a later release" for _, _, s in _written(given, Support.LATER)]
    never = [f"{s} has no effect: {o.help}" for _, o, s in _written(given, Support.NO_EFFECT)]
    return later + never


def _main_problems(main: Main) -> list[str]:
    rules = (
        (main.workers != 1, "[Main] workers: this release runs as one process only"),
        (
            main.tls_enabled and not (main.tls_cert and main.tls_key),
            "TLS cert and key are required if TLS is enabled",
        ),
        (
            main.expired_credential_cleanup_interval < _SHORTEST_CLEANUP,
            "expired credential cleanup interval must be >= 100ms",
        ),
        (main.poll_interval < _SHORTEST_POLL, "poll interval must be >= 1s"),
        (
            main.max_client_request_body_size <= 0,
            "max client request body size must be greater than zero",
        ),
        (main.max_request_head_size <= 0, "max request head size must be greater than zero"),
    )
    return [text for broken, text in rules if broken]


def _with_uris(main: Main) -> Main:
    default = Main().base_uri
    base = default if main.base_uri.rstrip("/") == _OLD_BASE_URI else main.base_uri
    client_side = main.client_side_base_uri
    if not client_side:
        client_side = _CLIENT_SIDE_BASE_URI if base == default else base
    return replace(main, base_uri=base, client_side_base_uri=client_side)


def _redis(redis: Redis) -> tuple[Redis | None, list[str]]:
    if not (redis.url or redis.host or redis.port):
        return None, []
    if redis.url and (redis.host or redis.port):
        return None, ["please specify Redis URL or host/port, but not both"]
    url = redis.url or f"redis://{redis.host or 'localhost'}:{redis.port or 6379}"
    try:
        hostname = urlsplit(url).hostname
    except ValueError:
        hostname = None
    if not hostname and urlsplit(redis.url).scheme != "unix":
        return None, ["invalid Redis hostname"]
    if redis.tls and url.startswith("redis://"):
        url = "rediss" + url.removeprefix("redis")
    return replace(redis, url=url), []
