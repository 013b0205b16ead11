"""File and environment to `Config`: merged first, validated after, all problems at once (config 3).

The environment is a mapping that the caller passes; nothing here reads the process's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.config import checks
from relay.config.checks import ENVIRONMENT, FILTERS, SHARED, Draft, Key
from relay.config.schema import (
    NAMED_SECTIONS,
    SECTIONS,
    Config,
    EnvironmentConfig,
    Filters,
    Http,
    Option,
    Prometheus,
    Proxy,
    Webhook,
    options,
)
from relay.config.syntax import Assignment, FileSyntaxError, parse
from relay.config.types import BOOLEAN, file_boolean, stripped
from relay.errors import ConfigError
from relay.model.text import is_utf8, one_line

DEFAULT_FILE = "/etc/ld-relay.conf"
_SWITCHED = ("DynamoDB", "Datadog", "Stackdriver", "OpenTelemetry")
"""Sections of which the other variables count only once `enabled` is set."""
_LINK = re.compile(r"(?:tcp|udp|sctp)://(.+):([0-9]+)")
"""The address of a service, as Kubernetes and Docker's links write it."""
_SERVICE_VARIABLE = re.compile(
    r"(.+?)_(?:SERVICE_HOST|SERVICE_PORT(?:_.*)?"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)


@dataclass(slots=True)
class _RawOptions:
    """What the sources say so far."""

    values: dict[Key, Any] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    """Each named section, and where it was first seen."""
    unusable: set[Key] = field(default_factory=set)
    """What was given, and cannot be right."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complete: bool = True
    """Whether everything could be read; otherwise checks would find what is not there."""

    def put(self, key: Key, option: Option, text: str, source: str) -> None:
        """Take a value over; raises ValueError if it is not one."""
        kind = option.type
        if not kind.clean(text) and not kind.is_text:
            if kind is not BOOLEAN and not kind.is_list:
                self.drop(key)
            return
        try:
            value = kind.parse(text)
        except ValueError:
            self.unusable.add(key)
            raise
        self.set(key, (*self.values.get(key, ()), *value) if kind.is_list else value, source)

    def set(self, key: Key, value: object, source: str) -> None:
        self.values[key], self.sources[key] = value, source

    def drop(self, key: Key) -> None:
        self.values.pop(key, None)
        self.sources.pop(key, None)

    def of(self, section: str, name: str | None = None) -> dict[str, Any]:
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
    given = _RawOptions()
    if config_path:
        _read_file(given, config_path, allow_missing_file)
    if from_env:
        _read_environ(given, environ)
    draft = _draft(given)
    problems = given.problems + (checks.problems(draft) if given.complete else [])
    if problems:
        raise ConfigError(problems)
    return _config(draft, given.warnings)


def _read_file(given: _RawOptions, path: str, allow_missing: bool) -> None:
    try:
        content = Path(path).read_bytes()
        assignments = parse(content.decode())
    except FileNotFoundError:
        if not allow_missing:
            given.problems.append(f'configuration file "{path}" does not exist')
            given.complete = False
        return
    except FileSyntaxError as e:
        reason = f"{path}:{e.line}:{e.column}: {e}"
    except OSError as e:
        reason = e.strerror or "cannot be read"
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        reason = f"{path}:{line}: not UTF-8"
    else:
        for each in assignments:
            try:
                _assign(given, each, f"{path}:{each.line}")
            except ValueError as e:
                given.problems.append(f"{path}:{each.line}: {e}")
        return
    given.problems.append(f'failed to read configuration file "{path}": {reason}')
    given.complete = False


def _assign(given: _RawOptions, assignment: Assignment, source: str) -> None:
    where = f'unsupported or misspelled section "{assignment.section}"'
    known = {name.lower(): name for name in (*SECTIONS, *NAMED_SECTIONS)}
    section = known.get(assignment.section.lower())
    if section is None:
        raise ValueError(where)
    name = assignment.subsection
    if section in NAMED_SECTIONS:
        name = name or ""
        given.names.setdefault((section, name), source)
        where += f', subsection "{name}"'
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
    if option.type is BOOLEAN:
        value = "true" if assignment.value is None else BOOLEAN.clean(assignment.value)
        return "true" if file_boolean(value) else "false"
    if assignment.value is None:
        raise ValueError("blank value not supported for type")
    return assignment.value


def _read_environ(given: _RawOptions, everything: Mapping[str, str]) -> None:
    environ = _of_the_operator(everything)
    for section in SECTIONS:
        if section not in ("Redis", "Consul"):
            _read_section(given, section, environ)
    _read_redis(given, environ)
    _read_consul(given, environ)
    _clear_shared(given)
    for section, prefix in ((ENVIRONMENT, "LD_ENV_"), (FILTERS, "LD_FILTER_KEYS_")):
        for name in [v.removeprefix(prefix) for v in environ if v.startswith(prefix)]:
            if section == ENVIRONMENT and _is_environment_key(name, environ):
                continue
            if not is_utf8(name):
                given.problems.append(
                    f"{one_line(prefix + name)}: the variable's name is not UTF-8"
                )
                continue
            given.names.setdefault((section, name), prefix + name)
            _read_named(given, section, name, environ)
    given.warnings += _orphans(environ)
    if environ.get("LD_TRACE_LOG_BIG_SEGMENTS"):
        given.warnings.append("LD_TRACE_LOG_BIG_SEGMENTS takes effect in a later release")
    if environ.get("EVENTS_SAMPLING_INTERVAL"):
        given.problems.append("EVENTS_SAMPLING_INTERVAL: this variable is no longer supported")


def _of_the_operator(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that somebody may have set for us, without blanks around their values.

    Kubernetes, and Docker's links, set a dozen for each service of the neighbourhood. A service
    named "prometheus" makes `PROMETHEUS_PORT=tcp://10.0.0.1:9090` and more.
    """
    services = {
        name.removesuffix("_PORT")
        for name, value in environ.items()
        if name.endswith("_PORT") and _LINK.fullmatch(value)
    }

    def is_of_a_service(name: str) -> bool:
        # What the reference makes of `REDIS_PORT` is decided where Redis is read.
        match = _SERVICE_VARIABLE.fullmatch(name)
        return match is not None and match[1] in services and name != "REDIS_PORT"

    return {name: stripped(v) for name, v in environ.items() if not is_of_a_service(name)}


def _is_environment_key(name: str, environ: Mapping[str, str]) -> bool:
    """Whether `LD_ENV_` and this name is the option `envKey` of another environment.

    `LD_ENV_KEY_x` could as well be the SDK key of an environment "KEY_x"; it is, as in the
    reference, unless there is an environment "x".
    """
    other = name.removeprefix("KEY_")
    return (
        other != name and "LD_ENV_" + other in environ and not _is_environment_key(other, environ)
    )


def _read_section(given: _RawOptions, section: str, environ: Mapping[str, str]) -> None:
    for option in options(section):
        variable = option.variable
        if variable in environ:
            _take(given, (section, None, option.attribute), option, variable, environ[variable])
        if section in _SWITCHED and not given.values.get((section, None, "enabled")):
            return


def _read_named(given: _RawOptions, section: str, name: str, environ: Mapping[str, str]) -> None:
    for option in options(section):
        variable = option.variable + name
        if option.variable and variable in environ:
            _take(given, (section, name, option.attribute), option, variable, environ[variable])
    old = f"LD_TTL_MINUTES_{name}"
    if section == ENVIRONMENT and environ.get(old):
        reason = f"this variable is no longer supported; use LD_TTL_{name}"
        given.problems.append(f"{old}: {reason}")


def _take(given: _RawOptions, key: Key, option: Option, variable: str, text: str) -> None:
    try:
        given.put(key, option, text, variable)
    except ValueError as e:
        given.problems.append(f"{variable}: {e}")


def _switch(given: _RawOptions, environ: Mapping[str, str], variable: str) -> bool:
    try:
        return bool(environ.get(variable)) and bool(BOOLEAN.parse(environ[variable]))
    except ValueError as e:
        given.problems.append(f"{variable}: {e}")
        return False


def _read_redis(given: _RawOptions, environ: Mapping[str, str]) -> None:
    wanted = _switch(given, environ, "USE_REDIS")
    if not wanted and not _redis_enabled(given):
        # REDIS_PORT is not looked at: Kubernetes sets it beside any service named "redis".
        useless = [v for v in ("REDIS_URL", "REDIS_HOST") if environ.get(v)]
        if not environ.get("USE_REDIS"):
            given.warnings += [f"{v} has no effect without USE_REDIS=true" for v in useless]
        return
    if environ.get("REDIS_TTL"):
        given.problems.append("REDIS_TTL: this variable is no longer supported; use CACHE_TTL")
    for option in options("Redis"):
        if option.variable in environ:
            text = environ[option.variable]
            if option.variable == "REDIS_PORT" and text.startswith("tcp://"):
                # Links: the variable holds the whole address of what is named "redis" (config 3.5).
                host, _, text = text.removeprefix("tcp://").rpartition(":")
                if not _is_linked(given, host):
                    continue
                given.set(("Redis", None, "host"), host, "REDIS_PORT")
            _take(given, ("Redis", None, option.attribute), option, option.variable, text)
    if wanted and not _redis_enabled(given):
        given.set(("Redis", None, "host"), "localhost", "USE_REDIS")


def _is_linked(given: _RawOptions, address: str) -> bool:
    """Whether a link named "redis" leads where the operator wants to go: he said nothing else."""
    redis = given.of("Redis")
    host = str(redis.get("host") or "redis").lower()
    return not redis.get("url") and (host == address or host.partition(".")[0] == "redis")


def _redis_enabled(given: _RawOptions) -> bool:
    redis = given.of("Redis")
    return any(redis.get(attribute) for attribute in ("url", "host", "port"))


def _read_consul(given: _RawOptions, environ: Mapping[str, str]) -> None:
    if not _switch(given, environ, "USE_CONSUL"):
        return
    given.set(("Consul", None, "host"), "localhost", "USE_CONSUL")
    _read_section(given, "Consul", environ)


def _clear_shared(given: _RawOptions) -> None:
    """Variables that two sections share belong to the one that is in use."""
    if given.values.get(("AutoConfig", None, "key")):
        unused = "OfflineMode"
    elif given.values.get(("OfflineMode", None, "file_data_source")):
        unused = "AutoConfig"
    else:
        return
    for attribute in SHARED:
        given.drop((unused, None, attribute))


def _orphans(environ: Mapping[str, str]) -> Iterator[str]:
    """Say which variables belong to an environment that `LD_ENV_…` does not define."""
    own = ("", "LD_ENV_", "LD_ENV_KEY_")
    prefixes = [o.variable for o in options(ENVIRONMENT) if o.variable not in own]
    for variable in environ:
        if not environ[variable] or variable.startswith("LD_TTL_MINUTES_"):
            continue
        name = variable.removeprefix("LD_ENV_KEY_")
        alone = name != variable and not _is_environment_key("KEY_" + name, environ)
        if alone and not environ[variable].startswith("sdk-"):
            tail = f"it is the option envKey only beside LD_ENV_{name}"
            yield f'{variable} makes an environment "KEY_{name}"; {tail}'
        for prefix in prefixes:
            wanted = "LD_ENV_" + variable.removeprefix(prefix)
            if variable.startswith(prefix) and wanted not in environ:
                yield one_line(f"{variable} has no effect without {wanted}")


def _draft(given: _RawOptions) -> Draft:
    named = {section: [n for s, n in given.names if s == section] for section in NAMED_SECTIONS}
    headers: dict[Key, str] = {(s, n, ""): source for (s, n), source in given.names.items()}
    return Draft(
        sections={cls: cls(**given.of(name)) for name, cls in SECTIONS.items()},
        environments=tuple(
            EnvironmentConfig(name=name, **given.of(ENVIRONMENT, name))
            for name in named[ENVIRONMENT]
        ),
        filters={name: Filters(**given.of(FILTERS, name)) for name in named[FILTERS]},
        given=headers | given.sources,
        unusable=given.unusable,
    )


def _config(draft: Draft, warnings: list[str]) -> Config:
    return Config(
        main=checks.main_of(draft),
        events=checks.events_of(draft),
        environments=draft.environments,
        redis=checks.redis_of(draft),
        proxy=draft.of(Proxy),
        http=draft.of(Http),
        webhook=draft.of(Webhook),
        prometheus=draft.of(Prometheus),
        given={_label(key): source for key, source in draft.given.items()},
        warnings=(*warnings, *checks.warnings(draft)),
    )


def _label(key: Key) -> str:
    section, name, attribute = key
    label = section if name is None else f'{section} "{name}"'
    return f"{label}.{attribute}" if attribute else label
