"""Command line: parse arguments, call one function, return an exit code.

Without a command it takes ld-relay's flags, with one dash or two (config 3.1). `__main__` handles
`relay health`, `relay reload` and `relay eval`, which must not pay for these imports.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import uvloop
from msgspec.structs import replace

from relay import __version__
from relay.build.fleet import eviction_warning
from relay.config.load import DEFAULT_FILE, load
from relay.config.render import effective, secrets
from relay.config.schema import Config
from relay.errors import ConfigError, RelayError
from relay.imports import garbage_collection_paused
from relay.model.text import one_line
from relay.server.listeners import CannotListen
from relay.server.options import ServerOptions
from relay.server.run import run_once, serve, until_signal
from relay.server.site import build_site
from relay.telemetry.log import LogHandler, set_up

USAGE = """\
relay [serve] [options]   start the relay; the options are those of ld-relay
relay check [options]     show the configuration that results, or all that is wrong with it
relay eval FLAG --context JSON [--flags FILE | --url URL --sdk-key KEY] [--redis URL]
                          show what a flag gives to a context, and what led there
relay sync [options]      bring the database and published documents up to date once; exit with 0
                          if all environments are, 1 if some could not be brought there, 2 if the
                          configuration is wrong
relay archive --output FILE [options]
                          write the environments to an archive for relays in offline mode
relay reload [--pid N]    let the relay of this host read its configuration again
relay health [URL]        exit with 0 if a relay is ready (default: the one of this host)"""

COMMANDS = ("serve", "check", "sync", "archive")

SWITCHES = ("from-env", "allow-missing-file", "version", "dry-run")
"""Boolean flags, which may be written with a value: `-from-env=false`."""


RUN_ONCE = ("sync", "archive")
"""Commands that do their work for chosen environments and end."""

UNUSABLE = 2
"""Exit code of these if arguments or configuration are unusable; others return 1."""

_FLAG_VALUES = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
_log = logging.getLogger("relay")


class UsageError(RelayError):
    """Invalid command-line arguments."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:  # noqa: PLR0911
    """Run a command and return the exit code of the process."""
    command, rest = _command(arguments)
    unusable = UNUSABLE if command in RUN_ONCE else 1
    try:
        options = _parse(rest, command)
        if options.version:
            with _logs():
                _log.info("LaunchDarkly relay version %s", __version__)
            return 0
        config = _configuration(options, environ)
        if options.unread:
            warning = f"{len(options.unread)} arguments after the options are ignored"
            config = replace(config, warnings=(*config.warnings, warning))
    except UsageError as e:
        sys.stderr.write(_parser(command).format_help())
        return _failed("Error: %s", e, unusable)
    except ConfigError as e:
        if command == "check":
            sys.stderr.writelines(f"{one_line(problem)}\n" for problem in e.problems)
            return 1
        return _failed("Configuration error: %s", e, unusable)
    if command == "check":
        return _check(config)
    has_workers = config.main.workers != 1 and not config.main.exit_always
    if command == "serve" and has_workers:
        return _supervise(environ, config, options)  # its processes have logs of their own
    with _logs(config):
        run = {"sync": _sync, "archive": _archive}.get(command) or partial(_serve, environ)
        return run(config, options)


def _command(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command and its arguments; without a command it is `serve`."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return "serve", arguments


def _parser(command: str) -> _Parser:
    parser = _Parser(
        "relay",
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", default="", help="configuration file")
    add("--from-env", action="store_true", help="read environment variables; they override FILE")
    add("--allow-missing-file", action="store_true", help="start also if FILE does not exist")
    add("--flags", metavar="FILE", default="", help="serve a file of flags, reloaded on change")
    add("--version", action="store_true", help="show the version and exit")
    if command in RUN_ONCE:
        text = "only this environment; may be repeated"
        add("--environment", metavar="NAME", action="append", default=[], help=text)
        text = "ask a running relay, not LaunchDarkly"
        add("--from", metavar="URL", dest="relay", default="", help=text)
    if command == "archive":
        add("--output", metavar="FILE", required=True, help="path of the archive")
    if command == "sync":
        text = "publish documents there only: file:///FOLDER, s3://BUCKET/PREFIX, https://…{key}"
        add("--to", metavar="URL", default="", help=text)
        add("--dry-run", action="store_true", help="show what would change, and write nothing")
    add("unread", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _parse(arguments: Sequence[str], command: str) -> argparse.Namespace:
    """Return the options. As in ld-relay, they end at the first argument without a dash."""
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"unknown command {arguments[0]}")
    parser = _parser(command)
    options, unknown = parser.parse_known_args(list(_go_flags(arguments)))
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}")
    if command in RUN_ONCE and options.unread:
        # A stray word may lack its `--environment`, and must not mean "all environments".
        raise UsageError(f"unknown argument {options.unread[0]}")
    return options


def _go_flags(arguments: Sequence[str]) -> Iterator[str]:
    """Yield Go-style flags in argparse's form: two dashes, and no value after boolean ones."""
    for argument in arguments:
        name, has_value, value = argument.lstrip("-").partition("=")
        if argument in {"-", "-h"} or not argument.startswith("-"):
            yield argument
        elif name not in SWITCHES or not has_value:
            yield f"--{argument.lstrip('-')}"
        elif value.lower() not in _FLAG_VALUES:
            raise UsageError(f'invalid boolean value "{value}" for -{name}')
        elif _FLAG_VALUES[value.lower()]:
            yield f"--{name}"


def _configuration(options: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Return the configuration from file, environment and `--flags`.

    Raises:
        ConfigError: the configuration is invalid; contains every problem.
    """
    if options.flags:
        # A flags file needs no environment, but variables such as PORT still apply.
        from_env = options.from_env or not options.config
        environ = {**environ, "FLAGS_FILE": options.flags}
        config = load(options.config, from_env, options.allow_missing_file, environ)
        if config.offline_mode.file_data_source:
            raise ConfigError(["--flags serves a file by itself; leave out the archive"])
        if config.environments:
            names = ", ".join(f'"{each.name}"' for each in config.environments)
            raise ConfigError([f"--flags serves a file by itself; leave out environment {names}"])
        if config.auto_config.key:
            text = "--flags serves a file by itself; leave out the auto-configuration key"
            raise ConfigError([text])
        # FLAGS_FILE has no effect if only a file is read.
        return replace(config, main=replace(config.main, flags_file=options.flags))
    config = load(options.config, options.from_env, options.allow_missing_file, environ)
    offline = config.offline_mode.file_data_source
    if not config.uses_launchdarkly and not config.main.flags_file and not offline:
        raise ConfigError(["you must specify at least one environment in your configuration"])
    return config


class _Rereading:
    """Reads the configuration of this process again.

    Args:
        options: of the command line.
        environ: environment variables.
    """

    def __init__(self, options: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self._options = options
        self._environ = environ
        self._file = ""
        """Path of the configuration file, once there is one."""
        self._note_file()

    def read(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: it is invalid; contains every problem. A file that has vanished is one,
                even if it might have been missing at the start: more likely it is being replaced.
        """
        if self._file and not os.path.exists(self._file):  # noqa: PTH110 - as below
            raise ConfigError([f'configuration file "{self._file}" does not exist any more'])
        config = _configuration(self._options, self._environ)
        self._note_file()
        return config

    def _note_file(self) -> None:
        self._file = _file(self._options) or self._file


def _file(options: argparse.Namespace) -> str:
    """Return the path of the configuration file; empty without one."""
    file: str = options.config or ("" if options.from_env or options.flags else DEFAULT_FILE)
    # A missing file gets here only with `--allow-missing-file`.
    return file if file and os.path.exists(file) else ""  # noqa: PTH110 - one check, no path


def _source(options: argparse.Namespace) -> str:
    """Describe the source of the configuration for the log (config 3.1)."""
    if options.flags:
        return f"flags file {options.flags}"
    file = _file(options)
    if not file:
        return "configuration from environment variables"
    return f"configuration file {file}{' plus environment variables' if options.from_env else ''}"


@contextmanager
def _logs(config: Config | None = None) -> Iterator[None]:
    """Set up logging, and flush it at the end."""
    output = LogHandler(secrets(config) if config else ())
    set_up(
        config.main.log_level if config else "info",
        config.main.log_format if config else "text",
        output,
    )
    try:
        yield
    finally:
        output.close()


def _failed(text: str, reason: RelayError, code: int) -> int:
    with _logs():
        _log.error(text, reason)
    return code


def _check(config: Config) -> int:
    """Print the configuration, and the problems that otherwise only a start would find."""
    problems = list(_unusable_resources(config))
    if not problems and (warning := asyncio.run(eviction_warning(config))):
        config = replace(config, warnings=(*config.warnings, warning))
    sys.stdout.write(effective(config))
    sys.stderr.writelines(f"{one_line(problem)}\n" for problem in problems)
    return 1 if problems else 0


def _unusable_resources(config: Config) -> Iterator[str]:
    """Yield problems with the files and addresses that a configuration names."""
    options = ServerOptions.of(config)
    build = partial(build_site, config, options.limits)
    for check in (options.tls.check if options.tls else None, build):
        try:
            if check:
                check()
        except ConfigError as e:
            yield from e.problems


def _serve(environ: Mapping[str, str], config: Config, options: argparse.Namespace) -> int:
    """Serve until a signal, or fill the databases once; return the exit code."""
    text = "Starting LaunchDarkly relay version %s with %s"
    _log.info(text, __version__, _source(options))
    for warning in config.warnings:
        _log.warning("%s", warning)
    try:
        if config.main.exit_always:
            return _run_once(config)
        server, hangups = ServerOptions.of(config), asyncio.Event()
        read = _Rereading(options, environ).read
        build = partial(build_site, config, server.limits, read, hangups, server.tls)
        uvloop.run(serve(server, build, hangups))
    except CannotListen as e:
        _log.error("%s", e)
        return 1
    except ConfigError as e:
        _log.error("Unable to create relay: %s", e)
        return 1
    return 0


def _supervise(environ: Mapping[str, str], config: Config, options: argparse.Namespace) -> int:
    """Serve with several processes until a signal; return the exit code."""
    with garbage_collection_paused():
        from relay.server.workers import serve_with_workers  # noqa: PLC0415 - see `build_site`

    text = f"Starting LaunchDarkly relay version {__version__} with {_source(options)}"
    return serve_with_workers(config, text, _Rereading(options, environ).read)


def _run_once(config: Config) -> int:
    from relay.build.relay import build  # noqa: PLC0415 - see `build_site`

    _log.info("Running in one-shot mode - will exit immediately after initializing environments")
    work = run_once(build(config), fail_fast=config.main.exit_on_error)
    if uvloop.run(until_signal(work)):
        return 0
    _log.error("Unable to create relay: one or more environments failed to initialize")
    return 1


def _sync(config: Config, options: argparse.Namespace) -> int:
    from relay.cli.sync import sync  # noqa: PLC0415 - a server needs nothing of it

    return sync(config, options.environment, options.relay, options.to, dry_run=options.dry_run)


def _archive(config: Config, options: argparse.Namespace) -> int:
    from relay.cli.archive import write_archive  # noqa: PLC0415 - a server needs nothing of it

    return write_archive(config, options.environment, options.relay, options.output)
