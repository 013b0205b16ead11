"""Load a `Config` from file and environment: merge, validate, report all errors (config 3).

The environment is a mapping that the caller passes; nothing here reads `os.environ`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.config import checks, references
from relay.config.checks import ENVIRONMENT, FILTERS, SHARED, Draft, Key
from relay.config.options import Option
from relay.config.schema import (
    NAMED_SECTIONS,
    SECTIONS,
    AutoConfig,
    Config,
    EnvironmentConfig,
    Filters,
    Fleet,
    Http,
    OfflineMode,
    Prometheus,
    Proxy,
    Publish,
    Webhook,
    options,
)
from relay.config.syntax import Assignment, FileSyntaxError, parse
from relay.config.types import BOOLEAN, PATH, file_boolean, stripped
from relay.errors import ConfigError
from relay.model.text import is_utf8, one_line

DEFAULT_FILE = "/etc/ld-relay.conf"
_NEED_ENABLED = ("DynamoDB", "Datadog", "Stackdriver", "OpenTelemetry")
"""Sections whose other variables are ignored unless `enabled` is set."""
_LINK_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://(.+):([0-9]+)")
"""Address of a service, as Kubernetes and Docker links write it."""
_SERVICE_VARIABLE = re.compile(
    r"(.+?)_(?:SERVICE_HOST|SERVICE_PORT(?:_.*)?"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)


@dataclass(slots=True)
class _RawOptions:
    """Options read so far, from all sources."""

    values: dict[Key, Any] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    """Source of the first occurrence of each named section."""
    unusable: set[Key] = field(default_factory=set)
    """Options that were set to an invalid value."""
    spellings: dict[Key, str] = field(default_factory=dict)
    """Name by which the file has set an option: that of the option, or of its reference."""
    references: dict[str, str] = field(default_factory=dict)
    """Source of each variable whose value is in a file: `X_FILE=PATH` by X."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Paths of the files that were read."""
    complete: bool = True
    """False if a source could not be read; checks would then report options as missing."""

    def put(self, key: Key, option: Option, text: str, source: str) -> None:
        """Parse and store a value; an empty one unsets the option. Raises ValueError if invalid."""
        type_ = option.type
        if not type_.clean(text) and not type_.is_text:
            if type_ is not BOOLEAN and not type_.is_list:
                self.drop(key)
            return
        try:
            value = type_.parse(text)
        except ValueError:
            self.unusable.add(key)
            raise
        self.set(key, (*self.values.get(key, ()), *value) if type_.is_list else value, source)

    def set(self, key: Key, value: object, source: str) -> None:
        self.values[key], self.sources[key] = value, source

    def drop(self, key: Key) -> None:
        self.values.pop(key, None)
        self.sources.pop(key, None)

    def source_of(self, variable: str) -> str:
        """Return the source of a variable: itself, or its reference."""
        return self.references.get(variable, variable)

    def of(self, section: str, name: str | None = None) -> dict[str, Any]:
        """Return the values of a section by attribute."""
        return {a: v for (s, n, a), v in self.values.items() if (s, n) == (section, name)}


def load(
    config_path: str, from_env: bool, allow_missing_file: bool, environ: Mapping[str, str]
) -> Config:
    """Return the validated configuration of file and environment together.

    Args:
        config_path: path of the file; if empty and `from_env` is not set, the default file is
            read or, if that does not exist, the environment.
        from_env: read environment variables.
        allow_missing_file: ignore a file that does not exist.
        environ: environment variables.

    Raises:
        ConfigError: the configuration is invalid; contains every problem.
    """
    raw = _RawOptions()
    if not config_path and not from_env:
        from_env = not Path(DEFAULT_FILE).exists()
        config_path = "" if from_env else DEFAULT_FILE
        raw.files += [DEFAULT_FILE] if from_env else []
    if config_path:
        _read_file(raw, config_path, allow_missing_file)
    if from_env:
        _read_environ(raw, environ)
    draft = _draft(raw)
    problems = raw.problems + (checks.problems(draft) if raw.complete else [])
    if problems:
        raise ConfigError(problems)
    return _config(draft, raw)


def _read_file(raw: _RawOptions, path: str, allow_missing: bool) -> None:
    raw.files.append(path)
    try:
        content = Path(path).read_bytes()
        assignments = parse(content.decode())
    except FileNotFoundError:
        if not allow_missing:
            raw.problems.append(f'configuration file "{path}" does not exist')
            raw.complete = False
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
                _assign(raw, each, f"{path}:{each.line}")
            except ValueError as e:
                raw.problems.append(f"{path}:{each.line}: {e}")
        return
    raw.problems.append(f'failed to read configuration file "{path}": {reason}')
    raw.complete = False


def _assign(raw: _RawOptions, assignment: Assignment, source: str) -> None:
    unknown = f'unsupported or misspelled section "{assignment.section}"'
    sections = {name.lower(): name for name in (*SECTIONS, *NAMED_SECTIONS)}
    section = sections.get(assignment.section.lower())
    if section is None:
        raise ValueError(unknown)
    name = assignment.subsection
    if section in NAMED_SECTIONS:
        name = name or ""
        raw.names.setdefault((section, name), source)
        unknown += f', subsection "{name}"'
    elif name is not None:
        raise ValueError(f'{unknown}, subsection "{name}"')
    if not assignment.name:
        return
    option = next((o for o in options(section) if o.name.lower() == assignment.name.lower()), None)
    reference = None if option else references.file_target(section, assignment.name)
    option = option or reference
    if option is None:
        raise ValueError(f'{unknown}, variable "{assignment.name}"')
    key: Key = (section, name, option.attribute)
    spelling = f"{option.name}File" if reference else option.name
    try:
        text = _file_text(option, assignment)
        _put_assigned(raw, key, option, text, source, spelling=spelling)
    except ValueError as e:
        label = references.label(spelling, assignment.value or "") if reference else spelling
        raise ValueError(f"{label}: {e}") from None


def _put_assigned(
    raw: _RawOptions, key: Key, option: Option, text: str, source: str, *, spelling: str
) -> None:
    """Store the value of an option, or the one in the file that its reference names."""
    is_set = bool(stripped(text))
    if is_set and raw.spellings.setdefault(key, spelling) != spelling:
        raise ValueError(f"{raw.spellings[key]} is set, too; only one of them may be")
    if spelling == option.name:
        raw.put(key, option, text, source)
    elif is_set:
        raw.put(key, option, _value_in(raw, key, text), source)


def _value_in(raw: _RawOptions, key: Key, path: str) -> str:
    """Return the value that a file holds for an option; raises ValueError without one."""
    raw.files.append(PATH.parse(path))
    try:
        return references.read_value(path)
    except ValueError:
        raw.unusable.add(key)
        raise


def _file_text(option: Option, assignment: Assignment) -> str:
    if option.type is BOOLEAN:
        value = "true" if assignment.value is None else BOOLEAN.clean(assignment.value)
        return "true" if file_boolean(value) else "false"
    if assignment.value is None:
        raise ValueError("blank value not supported for type")
    return assignment.value


def _read_environ(raw: _RawOptions, all_variables: Mapping[str, str]) -> None:
    environ = _with_referenced(raw, _without_service_links(all_variables))
    for section in SECTIONS:
        if section not in ("Redis", "Consul"):
            _read_section(raw, section, environ)
    _read_redis(raw, environ)
    _read_consul(raw, environ)
    _clear_shared(raw)
    for section, prefix in ((ENVIRONMENT, "LD_ENV_"), (FILTERS, "LD_FILTER_KEYS_")):
        for name in [v.removeprefix(prefix) for v in environ if v.startswith(prefix)]:
            if section == ENVIRONMENT and _is_environment_key(name, environ):
                continue
            if not is_utf8(name):
                raw.problems.append(f"{one_line(prefix + name)}: the variable's name is not UTF-8")
                continue
            raw.names.setdefault((section, name), raw.source_of(prefix + name))
            _read_named(raw, section, name, environ)
    raw.warnings += _orphans(environ)
    if environ.get("LD_TRACE_LOG_BIG_SEGMENTS"):
        text = "LD_TRACE_LOG_BIG_SEGMENTS has no effect: who is in a segment is never logged"
        raw.warnings.append(text)
    if environ.get("EVENTS_SAMPLING_INTERVAL"):
        raw.problems.append("EVENTS_SAMPLING_INTERVAL: this variable is no longer supported")


def _without_service_links(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the operator may have set, with stripped values.

    Kubernetes and Docker links set about a dozen variables for every service in reach: one named
    "prometheus" yields `PROMETHEUS_PORT=tcp://10.0.0.1:9090` and more. These are left out.
    """
    services = {
        name.removesuffix("_PORT")
        for name, value in environ.items()
        if name.endswith("_PORT") and _LINK_ADDRESS.fullmatch(value)
    }

    def is_service_link(name: str) -> bool:
        # ld-relay gives `REDIS_PORT` a meaning of its own; see `_read_redis`.
        match = _SERVICE_VARIABLE.fullmatch(name)
        return match is not None and match[1] in services and name != "REDIS_PORT"

    return {name: stripped(v) for name, v in environ.items() if not is_service_link(name)}


def _with_referenced(raw: _RawOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with `X` in place of each `X_FILE` that names a file; see `references`.

    If the file cannot be used, X is empty: the environment exists, and further errors would only
    follow from this one.
    """
    result: dict[str, str] = {}
    for variable, text in environ.items():
        target = references.variable_target(variable, text)
        if target is None:
            result.setdefault(variable, text)
            continue
        option, name = target
        replaced = variable.removesuffix(references.SUFFIX)
        if environ.get(replaced):
            raw.problems.append(f"{variable}: {replaced} is set, too; only one of them may be")
            continue
        source = raw.references[replaced] = references.label(variable, text)
        try:
            result[replaced] = _value_in(raw, (option.section, name, option.attribute), text)
        except ValueError as e:
            result[replaced] = ""
            raw.problems.append(f"{source}: {e}")
    return result


def _is_environment_key(name: str, environ: Mapping[str, str]) -> bool:
    """Return whether `LD_ENV_` plus this name sets `envKey` of another environment.

    `LD_ENV_KEY_x` is ambiguous: as in ld-relay, it is the SDK key of an environment "KEY_x", unless
    there is an environment "x".
    """
    other = name.removeprefix("KEY_")
    return (
        other != name and "LD_ENV_" + other in environ and not _is_environment_key(other, environ)
    )


def _read_section(raw: _RawOptions, section: str, environ: Mapping[str, str]) -> None:
    for option in options(section):
        variable = option.variable
        if variable in environ:
            _put(raw, (section, None, option.attribute), option, variable, environ[variable])
        if section in _NEED_ENABLED and not raw.values.get((section, None, "enabled")):
            return


def _read_named(raw: _RawOptions, section: str, name: str, environ: Mapping[str, str]) -> None:
    for option in options(section):
        variable = option.variable + name
        if option.variable and variable in environ:
            _put(raw, (section, name, option.attribute), option, variable, environ[variable])
    old = f"LD_TTL_MINUTES_{name}"
    if section == ENVIRONMENT and environ.get(old):
        reason = f"this variable is no longer supported; use LD_TTL_{name}"
        raw.problems.append(f"{old}: {reason}")


def _put(raw: _RawOptions, key: Key, option: Option, variable: str, text: str) -> None:
    source = raw.source_of(variable)
    try:
        raw.put(key, option, text, source)
    except ValueError as e:
        raw.problems.append(f"{source}: {e}")


def _is_on(raw: _RawOptions, environ: Mapping[str, str], variable: str) -> bool:
    try:
        return bool(environ.get(variable)) and bool(BOOLEAN.parse(environ[variable]))
    except ValueError as e:
        raw.problems.append(f"{variable}: {e}")
        return False


def _read_redis(raw: _RawOptions, environ: Mapping[str, str]) -> None:
    is_on = _is_on(raw, environ, "USE_REDIS")
    if not is_on and not _redis_enabled(raw):
        # REDIS_PORT is ignored: Kubernetes sets it if there is a service named "redis".
        addresses = ("REDIS_URL", "REDIS_HOST", "REDIS_SENTINELS")
        ineffective = [v for v in addresses if environ.get(v)]
        if not environ.get("USE_REDIS"):
            raw.warnings += [f"{v} has no effect without USE_REDIS=true" for v in ineffective]
        return
    if environ.get("REDIS_TTL"):
        raw.problems.append("REDIS_TTL: this variable is no longer supported; use CACHE_TTL")
    for option in options("Redis"):
        if option.variable in environ:
            text = environ[option.variable]
            if option.variable == "REDIS_PORT" and text.startswith("tcp://"):
                # A service link holds the whole address of the service named "redis" (config 3.5).
                host, _, text = text.removeprefix("tcp://").rpartition(":")
                if environ.get("REDIS_SENTINELS") or not _is_linked(raw, host):
                    continue
                raw.set(("Redis", None, "host"), host, "REDIS_PORT")
            _put(raw, ("Redis", None, option.attribute), option, option.variable, text)
    if is_on and not _redis_enabled(raw):
        raw.set(("Redis", None, "host"), "localhost", "USE_REDIS")


def _is_linked(raw: _RawOptions, address: str) -> bool:
    """Return whether a link named "redis" contradicts nothing that the operator has set."""
    redis = raw.of("Redis")
    host = str(redis.get("host") or "redis").lower()
    has_others = redis.get("url") or redis.get("sentinels")
    return not has_others and (host == address or host.partition(".")[0] == "redis")


def _redis_enabled(raw: _RawOptions) -> bool:
    redis = raw.of("Redis")
    return any(redis.get(attribute) for attribute in ("url", "host", "port", "sentinels"))


def _read_consul(raw: _RawOptions, environ: Mapping[str, str]) -> None:
    if not _is_on(raw, environ, "USE_CONSUL"):
        return
    raw.set(("Consul", None, "host"), "localhost", "USE_CONSUL")
    _read_section(raw, "Consul", environ)


def _clear_shared(raw: _RawOptions) -> None:
    """Drop the variables that two sections share from the one that is not in use."""
    if raw.values.get(("AutoConfig", None, "key")):
        unused = "OfflineMode"
    elif raw.values.get(("OfflineMode", None, "file_data_source")):
        unused = "AutoConfig"
    else:
        return
    for attribute in SHARED:
        raw.drop((unused, None, attribute))


def _orphans(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable of an environment that no `LD_ENV_…` defines."""
    defining = ("", "LD_ENV_", "LD_ENV_KEY_")
    prefixes = [o.variable for o in options(ENVIRONMENT) if o.variable not in defining]
    for variable in environ:
        if not environ[variable] or variable.startswith("LD_TTL_MINUTES_"):
            continue
        name = variable.removeprefix("LD_ENV_KEY_")
        is_sdk_key = name != variable and not _is_environment_key("KEY_" + name, environ)
        if is_sdk_key and not environ[variable].startswith("sdk-"):
            tail = f"it is the option envKey only beside LD_ENV_{name}"
            yield f'{variable} makes an environment "KEY_{name}"; {tail}'
        name = variable.removeprefix("LD_ENV_")
        is_path = name != variable and not environ[variable].startswith("sdk-")
        if is_path and name.endswith(references.SUFFIX):
            yield f'{variable} makes an environment "{name}"; a path to a file would have a /'
        for prefix in prefixes:
            required = "LD_ENV_" + variable.removeprefix(prefix)
            if variable.startswith(prefix) and required not in environ:
                yield one_line(f"{variable} has no effect without {required}")


def _draft(raw: _RawOptions) -> Draft:
    values: dict[tuple[str, str | None], dict[str, Any]] = {}
    for (section, name, attribute), value in raw.values.items():
        values.setdefault((section, name), {})[attribute] = value
    named = {section: [n for s, n in raw.names if s == section] for section in NAMED_SECTIONS}
    headers: dict[Key, str] = {(s, n, ""): source for (s, n), source in raw.names.items()}
    return Draft(
        sections={cls: cls(**values.get((name, None), {})) for name, cls in SECTIONS.items()},
        environments=tuple(
            EnvironmentConfig(name=name, **values.get((ENVIRONMENT, name), {}))
            for name in named[ENVIRONMENT]
        ),
        filters={name: Filters(**values.get((FILTERS, name), {})) for name in named[FILTERS]},
        sources=headers | raw.sources,
        unusable=raw.unusable,
    )


def _config(draft: Draft, raw: _RawOptions) -> Config:
    main = checks.main_of(draft)
    certificate = [main.tls_cert, main.tls_key] if main.tls_enabled else []
    return Config(
        main=main,
        events=checks.events_of(draft),
        environments=draft.environments,
        filters=dict(draft.filters),
        redis=checks.redis_of(draft),
        consul=checks.consul_of(draft),
        dynamodb=checks.dynamodb_of(draft),
        fleet=draft.of(Fleet),
        publish=draft.of(Publish),
        proxy=draft.of(Proxy),
        http=draft.of(Http),
        webhook=draft.of(Webhook),
        prometheus=draft.of(Prometheus),
        offline_mode=draft.of(OfflineMode),
        auto_config=draft.of(AutoConfig),
        sources={_label(key): source for key, source in draft.sources.items()},
        warnings=(*raw.warnings, *checks.warnings(draft)),
        certificate=_digest(certificate),
        files=(*raw.files, *certificate),
    )


def _digest(paths: Sequence[str]) -> str:
    """Return a digest of the contents of files; those that cannot be read count as empty."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        with suppress(OSError, ValueError):
            if path.is_file():  # a pipe can be read only once
                digest.update(path.read_bytes())
    return digest.hexdigest() if paths else ""


def _label(key: Key) -> str:
    section, name, attribute = key
    label = section if name is None else f'{section} "{name}"'
    return f"{label}.{attribute}" if attribute else label
