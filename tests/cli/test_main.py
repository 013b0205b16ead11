"""The command line: arguments, output and exit codes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from relay import __version__
from relay import announcement as announcement_module
from relay.cli import health, main
from relay.server.listeners import listen
from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.process import PATIENCE, ROOT, RelayProcess, free_port
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, Address, Stream, ask
from tests.support.upstream import ScriptedUpstream

VERSION = f"LaunchDarkly relay version {__version__}"
NO_ENVIRONMENT = "you must specify at least one environment in your configuration"
FLAGS = '{"flagValues": {"lamp": "on"}}'
AUTHORIZED = [("Authorization", SDK_KEY)]
DEMO = [("Authorization", "sdk-demo")]
SECRETS = {
    "LD_ENV_main": "sdk-5ca1ab1e-0001-4000-8000-00000000a001",
    "LD_MOBILE_KEY_main": "mob-5ca1ab1e-0001-4000-8000-00000000b001",
    "LD_ENV_odd": "neither-prefix-nor-digits",
    "REDIS_PASSWORD": "password-of-redis",
    "WEBHOOK_SECRET": "secret-of-webhooks",
}
"""Variables whose whole value is secret."""
EMBEDDED = {
    "REDIS_URL": "redis://:password-in-redis-url@127.0.0.1:{port}",
    "PROXY_URL": "http://me:password%20of-proxy@127.0.0.1:{port}",
}
"""Variables whose value contains a secret."""
HIDDEN = (*SECRETS.values(), "password-in-redis-url", "password%20of-proxy", "password of-proxy")


@dataclass(frozen=True)
class Run:
    """Exit code of a command, and the text that it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(name="call")
def call_in_this_process(capfd) -> Iterator[Callable[..., Run]]:
    """Call a command that ends by itself, with only the given variables in its environment."""
    loggers = [logging.getLogger(name) for name in (None, "relay")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]

    def call(*arguments: str, **variables: str) -> Run:
        code = main.main(arguments, variables)
        printed = capfd.readouterr()
        return Run(code, printed.out, printed.err)

    yield call
    for logger, level, handlers in before:
        logger.level, logger.handlers[:] = level, handlers


def run(*arguments: str, **variables: str) -> Run:
    """Run a command that ends by itself, in a process."""
    done = subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(name="flags")
def flags_file(tmp_path) -> Path:
    """Path of a flags file."""
    path = tmp_path / "flags.json"
    path.write_text(FLAGS)
    return path


@pytest.fixture(name="launchdarkly")
async def scripted_launchdarkly():
    """A simulated LaunchDarkly with one flag for `SDK_KEY`."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", value="on")))
        yield upstream


def relay_of(upstream: ScriptedUpstream, folder: Path, **variables: str) -> RelayProcess:
    return RelayProcess(folder, STREAM_URI=upstream.url, **{"LD_ENV_main": SDK_KEY, **variables})


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        "--version",
        "-version",
        "--version=true",
        "-version=T",
        "--version=1",
        "serve --version",
        "--version --config /nowhere",
        "-from-env=false -version -allow-missing-file=0",
    ],
)
def test_the_version_wins_over_everything(call, arguments):
    """All spellings of ld-relay's flag print one line to stdout and succeed."""
    done = call(*arguments.split())
    assert done.code == 0
    assert re.fullmatch(rf"\S+ \S+ INFO: {re.escape(VERSION)}\n", done.out)
    assert done.err == ""


@pytest.mark.parametrize("arguments", ["--version=false", "--version=F", "--from-env", "-from-env"])
def test_nothing_to_serve_is_an_error(call, arguments):
    """Without an environment, the relay says so and exits."""
    done = call(*arguments.split())
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(rf"\S+ \S+ ERROR: Configuration error: {NO_ENVIRONMENT}\n", done.err)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--nope", "--nope"),
        ("-nope=1", "--nope=1"),
        ("--from-env=perhaps", 'invalid boolean value "perhaps" for -from-env'),
        ("--from-env=", 'invalid boolean value "" for -from-env'),
        ("--config", "--config: expected one argument"),
        ("--conf x", "unknown argument --conf"),
        ("serv --from-env", "unknown command serv"),
        ("check check", "unknown command check"),
    ],
)
def test_invalid_arguments_print_the_usage(call, arguments, error):
    """On stderr, with the reason on the last line, and exit code 1."""
    done = call(*arguments.split())
    assert (done.code, done.out) == (1, "")
    usage, _, reason = done.err.partition(" ERROR: Error: ")
    assert usage.startswith("usage: relay [serve]")
    assert "--allow-missing-file" in usage
    assert error in reason


def test_arguments_after_the_options_are_ignored_like_in_ld_relay(call):
    """The relay starts with `--from-env true`, as ld-relay does, and warns."""
    done = call("check", "--from-env", "true", "--port", LD_ENV_main="sdk-1")
    assert done.code == 0
    assert "# Warning: 2 arguments after the options are ignored" in done.out


@pytest.mark.parametrize("argument", ["-h", "--help", "-help"])
def test_help_is_no_error(call, capfd, argument):
    """It was requested, so it goes to stdout, with exit code 0."""
    with pytest.raises(SystemExit) as end:
        call(argument)
    assert end.value.code == 0
    printed = capfd.readouterr()
    assert "relay check" in printed.out
    assert printed.err == ""


def test_a_missing_file_must_be_allowed(call, tmp_path, flags):
    """Otherwise it is an error that names the file; variables may complete the configuration."""
    missing = str(tmp_path / "missing.conf")
    done = call("-config", missing, FLAGS_FILE=str(flags))
    assert done.code == 1
    assert f'configuration file "{missing}" does not exist' in done.err
    done = call("-config", missing, "-allow-missing-file", FLAGS_FILE=str(flags))
    assert (done.code, NO_ENVIRONMENT in done.err) == (1, True), "variables were not asked for"
    container = ("--config", missing, "--allow-missing-file", "--from-env")
    done = call(*container, FLAGS_FILE=str(flags), EXIT_ALWAYS="1")
    assert done.code == 0
    assert f"Starting {VERSION} with configuration from environment variables\n" in done.out


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ("--config=FILE", "configuration file FILE"),
        ("-config FILE", "configuration file FILE"),
        ("--config FILE -from-env=true", "configuration file FILE plus environment variables"),
        ("--from-env", "configuration from environment variables"),
        ("", "configuration file DEFAULT"),
        ("", "configuration from environment variables"),
    ],
)
def test_the_source_of_the_configuration_is_logged(call, monkeypatch, flags, arguments, source):
    """A file, variables, or both; without flags, the default file or variables."""
    files = {"FILE": flags.with_name("relay.conf"), "DEFAULT": flags.with_name("default.conf")}
    for name, file in files.items():
        if arguments or name in source:  # the default file is there, but in the last case
            file.write_text(f"[Main]\nflagsFile = {flags}\nexitAlways = true\n")
        arguments, source = (text.replace(name, str(file)) for text in (arguments, source))
    for module in ("relay.config.load", "relay.cli.main"):
        monkeypatch.setattr(f"{module}.DEFAULT_FILE", str(files["DEFAULT"]))
    variables = {"FLAGS_FILE": str(flags), "EXIT_ALWAYS": "true"}
    done = call(*arguments.split(), **(variables if "variables" in source else {}))
    assert done.code == 0
    assert f"Starting {VERSION} with {source}\n" in done.out


# relay check


def test_check_prints_the_effective_configuration(call, tmp_path):
    """With sources, secrets masked; nothing is connected or written."""
    file = tmp_path / "relay.conf"
    file.write_text(f"[Main]\nport = 9000\nsnapshotDir = {tmp_path / 'snapshots'}\n")
    embedded = {name: text.format(port=1) for name, text in EMBEDDED.items()}
    secret = {name: text for name, text in SECRETS.items() if name != "REDIS_PASSWORD"}
    prefixes = {"LD_PREFIX_main": "m", "LD_PREFIX_odd": "o", "USE_REDIS": "1"}
    done = call("check", "--config", str(file), "-from-env", **secret, **embedded, **prefixes)
    assert done.err == ""
    assert done.code == 0
    assert re.search(rf"(?m)^port = 9000 +# {file}:2$", done.out)
    assert "sdkKey = ...a001" in done.out
    assert "password" not in done.out.replace("# password =", "")
    assert not [secret for secret in HIDDEN if secret in done.out]
    assert not (tmp_path / "snapshots").exists()


def test_check_names_all_problems_with_their_source(call, tmp_path):
    """One line each on stderr, and no configuration on stdout."""
    file = tmp_path / "relay.conf"
    file.write_text("[Main]\nport = 70000\nnope = 1\n[Redis]\nhost = h\nreadTimeout = soon\n")
    done = call("check", "--config", str(file), "--from-env", LD_ENV_x="sdk-1", INIT_TIMEOUT="x")
    assert (done.code, done.out) == (1, "")
    lines = done.err.splitlines()
    assert len(lines) == 4, done.err
    for source in (f"{file}:2", f"{file}:3", f"{file}:6", "INIT_TIMEOUT"):
        assert len([line for line in lines if source in line]) == 1, source
    done = call("check", "--config", str(tmp_path / "missing"))
    assert (done.code, done.out) == (1, "")
    assert "does not exist" in done.err
    assert call("check", "--from-env") == Run(1, "", f"{NO_ENVIRONMENT}\n")


def test_check_reports_unusable_files(call, tmp_path):
    """The problems that a start would find are reported together; the start reports them, too."""
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnope\n-----END CERTIFICATE-----\n")
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(broken), "TLS_KEY": str(tmp_path / "none.pem")}
    authorities = {"PROXY_CA_CERTS": str(tmp_path / "absent.pem")}
    redis = {"USE_REDIS": "1", "REDIS_URL": "rediss://:hidden@h:1", "REDIS_CA_FILE": str(broken)}
    done = call("check", "--from-env", LD_ENV_main=SDK_KEY, **tls, **authorities)
    assert done.code == 1
    assert "sdkKey = ...a001" in done.out
    first, second = done.err.splitlines()
    assert first.startswith(f"TLS certificate {broken} with key {tmp_path / 'none.pem'} cannot be")
    assert second.startswith(f"CA file {tmp_path / 'absent.pem'} cannot be used")
    done = call("check", "--from-env", LD_ENV_main=SDK_KEY, **redis)
    assert done.code == 1
    assert done.err.startswith(f"Redis at rediss://:xxxxx@h:1: CA file {broken} cannot be used: ")
    for variables in (tls, authorities, redis):
        done = call("--from-env", LD_ENV_main=SDK_KEY, **variables)
        assert done.code == 1
        assert done.err.count("Unable to create relay: ") == 1
        assert "Traceback" not in done.err


def test_unusable_proxies_of_the_environment_are_named(tmp_path, flags):
    """Check and start report all of them; without upstream requests they do not matter."""
    proxies = {"http_proxy": "socks5://me:hidden@h:1", "HTTPS_PROXY": "socks5h://me:hidden@h:1"}
    must = ": the proxy's URL must be http://host:port or https://host:port"
    done = run("check", "--from-env", LD_ENV_main=SDK_KEY, **proxies)
    assert (done.code, done.err) == (1, "".join(f"{name}{must}\n" for name in proxies))
    done = run("--from-env", LD_ENV_main=SDK_KEY, **proxies)
    assert done.code == 1
    assert f"Unable to create relay: {', '.join(f'{name}{must}' for name in proxies)}\n" in done.err
    assert "hidden" not in done.err + done.out
    for more in ({"PROXY_URL": "http://h:1", "LD_ENV_main": SDK_KEY}, {"FLAGS_FILE": str(flags)}):
        assert run("check", "--from-env", **more, **proxies).code == 0


TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
"""Runs a command in a terminal, where OpenSSL could prompt."""


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("name", "option"),
    [("TLS_KEY", "[Main] tlsKey"), ("REDIS_CLIENT_KEY_FILE", "[Redis] clientKeyFile")],
)
def test_there_is_no_prompt_for_a_pass_phrase(tmp_path, name, option, terminal, command):
    """An encrypted key ends the start with an error, with and without a terminal."""
    issued = trustme.CA().issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    plain = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encryption = BestAvailableEncryption(b"secret")
    key.write_bytes(plain.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    variables = {
        "TLS_KEY": {"TLS_ENABLED": "true", "TLS_CERT": str(cert)},
        "REDIS_CLIENT_KEY_FILE": {
            "USE_REDIS": "true",
            "REDIS_URL": "rediss://localhost:1",
            "REDIS_CLIENT_CERT_FILE": str(cert),
        },
    }[name]
    variables |= {name: str(key), "LD_ENV_main": SDK_KEY, "PORT": str(free_port())}
    done = subprocess.run(
        [
            *((sys.executable, "-c", TERMINAL) if terminal else ()),
            *(sys.executable, "-m", "relay", command, "--from-env"),
        ],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert f"{option}: the private key in {key} is encrypted; " in printed
    assert "pass phrase:" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("query", ["db=x", "socket_timeout=soon", "nope=1"])
def test_a_malformed_redis_url_is_named(call, query):
    """A URL that the driver rejects is a configuration error, not an unexpected one at run time."""
    url = f"redis://:hidden@h:1/0?{query}"
    done = call("check", "--from-env", LD_ENV_main=SDK_KEY, USE_REDIS="1", REDIS_URL=url)
    assert done.code == 1
    assert done.err.startswith("Redis at redis://:xxxxx@h:1/0: the URL cannot be used: ")
    assert "hidden" not in done.out + done.err


# relay serve


async def test_a_flags_file_is_served_and_reloaded_when_it_changes(tmp_path, flags):
    """Streams get the change; each error is logged once by name, and the old data stay."""
    async with RelayProcess(tmp_path, "serve", "--flags", str(flags)) as relay:
        await relay.said("Initialized LaunchDarkly client")
        assert f"with flags file {flags}\n" in relay.log
        stream = await Stream.open(relay.address, key="sdk-demo")
        assert b'"on"' in await stream.until(b"\n\n")
        flags.write_text('{"flagValues": {"lamp": "off"}}')
        assert (await stream.until(b"\n\n")).startswith(b"event: put\n")
        before = await ask(relay.address, "/sdk/flags", DEMO)
        assert b'"off"' in before.body

        flags.write_text('{"flags": {"lamp": {"on": "perhaps"}}}')
        await relay.said("the data before stay in force")
        assert re.search(rf"(?m)WARN: .*{flags}: .*\blamp\b.*\bon\b", relay.log)
        assert (await ask(relay.address, "/sdk/flags", DEMO)).body == before.body
        flags.write_text('{"flags": {"lamp": {"on": true}}')
        await relay.said("the data before stay in force", times=2)
        flags.write_text('{"flagValues": {"lamp": "on again"}}')
        assert b"on again" in await stream.until(b"\n\n")
        assert relay.log.count("WARN") == 2
        stream.close()


async def test_a_flags_file_is_served_beside_a_configuration(tmp_path, flags):
    """Only the server's own options of the configuration apply."""
    file = tmp_path / "relay.conf"
    file.write_text(f"[Main]\nport = {free_port()}\nlogFormat = json\nflagsFile = /nowhere\n")
    relay = RelayProcess(tmp_path, "--config", str(file), "--flags", str(flags))
    await relay.spawn()
    await relay.said("Initialized")
    assert f"from flags file {flags}" in relay.log
    await relay.kill()


async def test_a_flags_file_that_comes_later(tmp_path):
    """The relay waits for it, and logs its absence once, by name."""
    flags = tmp_path / "later.yaml"
    async with RelayProcess(tmp_path, "--flags", str(flags), INIT_TIMEOUT="100ms") as relay:
        await relay.said(f"{flags} cannot be read: No such file or directory")
        await relay.said('Error initializing LaunchDarkly client for "demo"')
        assert (await ask(relay.address, "/sdk/flags", DEMO)).status == 503
        flags.write_text("flagValues: {lamp: here}")
        await relay.said("data are current")
        assert b'"here"' in (await ask(relay.address, "/sdk/flags", DEMO)).body
        assert relay.log.count("cannot be read") == 1


def test_flags_and_environments_exclude_each_other(call, flags):
    """The relay does not guess which of them to serve."""
    done = call("--flags", str(flags), LD_ENV_Shop="sdk-1")
    assert done.code == 1
    assert '--flags serves a file by itself; leave out environment "Shop"' in done.err
    done = call("--flags", str(flags), AUTO_CONFIG_KEY="rel-1")
    assert done.code == 1
    assert "leave out the auto-configuration key" in done.err


async def test_the_start_is_logged_in_a_few_lines(tmp_path, launchdarkly):
    """Version and configuration, port, database, environment and source, and success."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        stores = {"USE_REDIS": "1", "REDIS_URL": redis.url, "LD_PREFIX_main": "shop"}
        async with relay_of(launchdarkly, tmp_path, **stores) as relay:
            await relay.said("Initialized")
            lines = relay.log.splitlines()
    wanted = [
        f"Starting {VERSION} with configuration from environment variables",
        f"Starting server listening on port {relay.port}",
        f"Using Redis data store: {redis.url} with prefix: shop",
        f'Serving environment "main" (SDK key ...a001) from {launchdarkly.url}',
        "Upstream is connected, data are current (1 items)",
        'Initialized LaunchDarkly client for "main" (SDK key ...a001)',
    ]
    assert [line for text in wanted for line in lines if text in line] == lines
    assert all(re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6} INFO: ", line) for line in lines)


async def test_many_environments_are_not_logged_one_by_one(tmp_path, launchdarkly):
    """Only their number is logged."""
    more = {f"LD_ENV_e{n}": f"sdk-{n:04}-environment" for n in range(20)}
    async with relay_of(launchdarkly, tmp_path, **more, DATA_SOURCE="polling",
                        BASE_URI=launchdarkly.url) as relay:  # fmt: skip
        await relay.said("Initialized")
        assert f"Serving 21 environments from {launchdarkly.url} (polled)\n" in relay.log
        assert "Serving environment" not in relay.log


async def test_a_port_in_use_is_an_error(tmp_path, flags):
    """In ld-relay's words, on one line, with exit code 1."""
    with closing(listen(0)) as taken:
        port = taken.getsockname()[1]
        done = await asyncio.to_thread(run, "--flags", str(flags), PORT=str(port))
    assert done.code == 1
    text = (
        f"Error starting http listener on port: {port}  listen tcp :{port}: Address already in use"
    )
    assert re.fullmatch(rf"\S+ \S+ ERROR: {text}\n", done.err)


async def test_tls_is_served(tmp_path, flags):
    """With the configured certificate and minimum version; `relay health` connects with TLS."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    file = ("--flags", str(flags))
    async with RelayProcess(tmp_path, *file, **tls, TLS_MIN_VERSION="1.3") as relay:
        await relay.said("TLS enabled for server (minimum TLS version: 1.3)")
        await relay.said("Initialized")
        assert (await ask(Address(relay.port, trust), "/sdk/flags", DEMO)).status == 200
        asked = await asyncio.to_thread(run, "health", PORT=str(relay.port), TLS_ENABLED="true")
        assert asked == Run(0, "", "")
        trust.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):
            await Address(relay.port, trust).connect()
        assert await relay.stop() == 0


@pytest.fixture
def configured(tmp_path, flags) -> tuple[Path, int]:
    """Path of a file that configures the server and its flags file, and the port."""
    issued = trustme.CA().issue_cert("relay.example.com")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    port, file = free_port(), tmp_path / "relay.conf"
    file.write_text(
        f"[Main]\nport = {port}\nflagsFile = {flags}\ntlsEnabled = yes\n"
        f"tlsCert = {tmp_path / 'cert.pem'}\ntlsKey = {tmp_path / 'key.pem'}\n"
    )
    return file, port


async def test_health_finds_the_port_and_scheme_of_the_server(tmp_path, configured, monkeypatch):
    """Port and TLS are set in a file only; the check uses TLS and is not logged."""
    file, port = configured
    relay = RelayProcess(tmp_path, "--config", str(file))
    relay.port = port
    async with relay:
        await relay.said("Initialized")
        asked = await asyncio.to_thread(run, "health", PORT=str(port))
        assert asked == Run(0, "", "")
        said = relay.log
        # Also where nothing tells how it is asked.
        monkeypatch.setattr(announcement_module, "announced", list)
        assert await asyncio.to_thread(health.main, [], {"PORT": str(port)}) == 0
        assert relay.log == said


CONTAINER = ("unshare", "--pid", "--net", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
LOOPBACK = "ip link set lo up"


class Contained(RelayProcess):
    """A relay that is process 1 of its namespace, with a network of its own."""

    command = (*CONTAINER, f'{LOOPBACK} && exec "$@"', "sh", *RelayProcess.command)

    @property
    def inside(self) -> str:
        """The process ID of the relay outside its container."""
        [inside] = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return inside

    def beside(self, *arguments: str, **variables: str) -> int:
        """Run a command in the same container; return its exit code."""
        enter = ("nsenter", "--pid", "--net", "--mount", f"--wd={ROOT}", "--target", self.inside)
        return subprocess.run(
            [*enter, *RelayProcess.command, *arguments],
            env={"PATH": os.environ["PATH"], **variables},
            cwd=ROOT,
            check=False,
            timeout=PATIENCE,
        ).returncode


@pytest.fixture
def containers() -> None:
    """Skip the test without the right to create namespaces."""
    if subprocess.run([*CONTAINER, LOOPBACK], check=False, capture_output=True).returncode:
        pytest.skip("no containers here")


@pytest.mark.usefixtures("containers")
async def test_health_finds_the_relay_of_its_container(tmp_path, configured):
    """The relay's command need not read the image's variables, such as PORT."""
    file, port = configured
    relay = Contained(tmp_path, "--config", str(file))
    await relay.spawn()
    try:
        await relay.said("Initialized")
        image = {"PORT": "8030"}
        assert await asyncio.to_thread(relay.beside, "health", **image) == 0
        for url, code in (f"https://127.0.0.1:{port}", 0), ("http://127.0.0.1:8030", 1):
            assert await asyncio.to_thread(relay.beside, "health", url, **image) == code
    finally:
        await relay.kill()


@pytest.mark.usefixtures("containers")
async def test_reload_knows_a_relay_in_a_container(tmp_path, configured):
    """From inside, and from the host by its process ID there; what started it is no relay."""
    file, _ = configured
    relay = Contained(tmp_path, "--config", str(file))
    await relay.spawn()
    try:
        await relay.said("Initialized")
        assert await asyncio.to_thread(relay.beside, "reload") == 0
        await relay.said("Configuration reloaded", 1)
        asked = await asyncio.to_thread(run, "reload", "--pid", str(relay.pid))
        assert (asked.code, "is no running relay" in asked.err) == (1, True)
        asked = await asyncio.to_thread(run, "reload", "--pid", relay.inside)
        assert (asked.code, asked.err) == (0, "")
        await relay.said("Configuration reloaded", 2)
    finally:
        await relay.kill()


async def test_health_reports_by_its_exit_code(tmp_path, launchdarkly):
    """0 for a relay that is ready; 1 and one line for one that is not ready or not there."""
    await launchdarkly.stop()
    async with relay_of(launchdarkly, tmp_path) as relay:
        asked = await asyncio.to_thread(run, "health", PORT=str(relay.port))
        assert asked == Run(1, "", "not ready: status 503\n")
        await launchdarkly.start()
        await relay.said("Initialized")
        assert await asyncio.to_thread(run, "health", relay.url) == Run(0, "", "")
        await relay.stop()
        asked = await asyncio.to_thread(run, "health", relay.url)
    assert (asked.code, asked.out) == (1, "")
    assert re.fullmatch("not ready: .*refused\n", asked.err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_at_any_moment(tmp_path, flags, number):
    """Also during startup; the exit code is 0, and nothing is logged as an error."""
    relay = RelayProcess(tmp_path, "--flags", str(flags))
    for text in ("Starting server listening", "Initialized"):
        await relay.spawn()
        await relay.until(lambda text=text: text in relay.log)
        relay.signal(number)
        assert await relay.ended() == 0
    assert "Traceback" not in relay.log
    assert not re.search("WARN|ERROR", relay.log)


async def test_a_hangup_ends_nothing(tmp_path, flags):
    """It is a request to reload at any time; one that comes during the start is not lost."""
    relay = RelayProcess(tmp_path, "--flags", str(flags), LOG_FORMAT="json")
    await relay.spawn()
    await relay.until(lambda: "Starting LaunchDarkly relay" in relay.log)
    relay.signal(signal.SIGHUP)
    await relay.said("Configuration reloaded")
    await relay.said("Initialized")
    relay.signal(signal.SIGHUP)
    await relay.said("Configuration reloaded", 2)
    assert (await ask(relay.address, "/sdk/flags", DEMO)).status == 200
    relay.signal(signal.SIGTERM)
    relay.signal(signal.SIGHUP)
    assert await relay.ended() == 0
    levels = [
        line["level"] for line in map(json.loads, relay.log.splitlines()) if "reload" in str(line)
    ]
    assert levels[:2] == ["info", "info"]
    assert "Traceback" not in relay.log


@pytest.mark.parametrize(
    "arguments", [["sync"], ["check"], ["eval"], ["reload"], [], ["serve"], ["--from-env"]]
)
def test_a_hangup_may_come_before_the_imports(arguments, monkeypatch):
    """A server blocks the signal before it imports anything; other commands are ended by it."""
    program = (
        "import os, signal, sys, relay.__main__ as program\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs tests may ignore it\n"
        f"sys.argv[1:] = {arguments}\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('relay.cli', 'relay.explain'):\n"
        "            os.kill(os.getpid(), signal.SIGHUP); os._exit(0)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "program.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=PATIENCE, cwd=ROOT)
    ends_by_itself = arguments[:1] in (["sync"], ["check"], ["eval"], ["reload"])
    assert done.returncode == (-signal.SIGHUP if ends_by_itself else 0)


# One-shot runs


async def test_a_one_shot_run_fills_the_database_and_exits(tmp_path, launchdarkly):
    """With exit code 0 all data are stored; nothing was served."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        stores = {"USE_REDIS": "1", "REDIS_URL": redis.url, "SNAPSHOT_DIR": str(tmp_path / "s")}
        relay = relay_of(launchdarkly, tmp_path, EXIT_ALWAYS="true", **stores)
        await relay.spawn()
        assert await relay.ended() == 0, relay.log
        assert redis.do("EXISTS", "launchdarkly:$inited") == 1
        assert list(redis.hash("launchdarkly:features")) == ["lamp"]
    assert "Running in one-shot mode - will exit immediately after initializing" in relay.log
    assert "listening" not in relay.log
    assert len(list((tmp_path / "s").glob("*.snapshot"))) == 1


UNSUCCESSFUL = "Unable to create relay: one or more environments failed to initialize\n"


@pytest.mark.parametrize("ignore", [True, False])
async def test_a_one_shot_run_that_fails_says_so(tmp_path, launchdarkly, ignore):
    """Exit code 1 after `initTimeout`; `ignoreConnectionErrors` makes the reason a warning."""
    launchdarkly.always(SDK_KEY, answers.stall)
    variables = {
        "EXIT_ALWAYS": "1",
        "INIT_TIMEOUT": "300ms",
        "IGNORE_CONNECTION_ERRORS": str(ignore),
    }
    relay = relay_of(launchdarkly, tmp_path, **variables)
    await relay.spawn()
    assert await relay.ended() == 1
    level = "WARN" if ignore else "ERROR"
    reason = f'{level}: Error initializing LaunchDarkly client for "main": no data from upstream'
    assert relay.log.count(reason) == 1
    assert relay.log.endswith(f" ERROR: {UNSUCCESSFUL}")


async def test_a_one_shot_run_needs_the_database(tmp_path, launchdarkly):
    """Data that could not be stored in time are a failure."""
    folder = tmp_path / "redis"
    folder.mkdir()
    stores = {"USE_REDIS": "1", "REDIS_URL": RedisServer(folder).url}
    relay = relay_of(launchdarkly, tmp_path, EXIT_ALWAYS="1", INIT_TIMEOUT="500ms", **stores)
    await relay.spawn()
    assert await relay.ended() == 1
    assert relay.log.count('The data of "main" could not be stored in time') == 1
    assert relay.log.count("is unavailable") == 1
    assert relay.log.endswith(UNSUCCESSFUL)


async def test_a_one_shot_run_may_end_at_the_first_error(tmp_path, launchdarkly):
    """With `exitOnError` a rejected key ends it, although another environment is still pending."""
    launchdarkly.always("sdk-late", answers.stall)
    variables = {"LD_ENV_late": "sdk-late", "LD_ENV_refused": "sdk-refused", "INIT_TIMEOUT": "60s"}
    relay = relay_of(launchdarkly, tmp_path, EXIT_ALWAYS="1", EXIT_ON_ERROR="1", **variables)
    begin = time.monotonic()
    await relay.spawn()
    assert await relay.ended() == 1
    assert time.monotonic() - begin < 10
    assert relay.log.count("Upstream refuses the key: HTTP error 401 (invalid SDK key)") == 1
    assert relay.log.endswith(UNSUCCESSFUL)


async def test_a_one_shot_run_can_be_interrupted(tmp_path, launchdarkly):
    """By a signal, without a traceback, with an exit code other than 0."""
    launchdarkly.always(SDK_KEY, answers.stall)
    relay = relay_of(launchdarkly, tmp_path, EXIT_ALWAYS="1", INIT_TIMEOUT="60s")
    await relay.spawn()
    await launchdarkly.requested()
    assert await relay.stop() == 1
    assert "Traceback" not in relay.log


# Logs


async def test_log_lines_can_be_objects(tmp_path, launchdarkly):
    """One JSON object per line, with time, level, message, and environment if there is one."""
    await launchdarkly.stop()
    async with relay_of(launchdarkly, tmp_path, LOG_FORMAT="json", INIT_TIMEOUT="100ms") as relay:
        await relay.said("Error initializing")
        await launchdarkly.start()
        await relay.said("data are current")
        await relay.stop()
    objects = [json.loads(line) for line in relay.log.splitlines()]
    assert {each["level"] for each in objects} == {"info", "warn", "error"}
    assert all(re.fullmatch(r"[\d-]+T[\d:]+\.\d{6}Z", each["time"]) for each in objects)
    [trouble] = [each for each in objects if each["level"] == "warn"]
    assert trouble["environment"] == "main"
    assert trouble["message"].startswith("Error in stream connection (will retry): cannot connect")


async def test_the_level_decides_what_is_logged(tmp_path, launchdarkly):
    """`none` logs nothing, whatever happens; `debug` logs every request."""
    levels = ("none", "debug")
    for level in levels:
        (tmp_path / level).mkdir()
    logs = {}
    for level in levels:
        async with relay_of(launchdarkly, tmp_path / level, LOG_LEVEL=level) as relay:
            await launchdarkly.connected(SDK_KEY, levels.index(level) + 1)
            launchdarkly.close_streams()
            await relay.address.ask(b"garbage\r\n\r\n")
            await ask(relay.address, "/sdk/flags", AUTHORIZED)
            await relay.stop()
            logs[level] = relay.log
    assert logs["none"] == ""
    assert logs["debug"].count("DEBUG: Request: method=GET url=/sdk/flags auth=*0a001") == 1


async def test_no_secret_is_ever_printed(tmp_path, launchdarkly):
    """Not in debug lines, errors of proxy, database or LaunchDarkly, health or `/status`."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder, requirepass="another") as redis:
        places = {name: text.format(port=redis.port) for name, text in EMBEDDED.items()}
        stores = {"USE_REDIS": "1", "LD_PREFIX_main": "m", "LD_PREFIX_odd": "o"}
        more = {"LOG_LEVEL": "debug", "INIT_TIMEOUT": "200ms", "SNAPSHOT_DIR": str(tmp_path / "s")}
        # With a proxy nothing comes from LaunchDarkly, and the password comes from its own variable.
        for left_out in ("", "PROXY_URL REDIS_PASSWORD"):
            variables = {**SECRETS, **places, **stores, **more}
            for name in left_out.split():
                del variables[name]
            values = unquote(" ".join(variables.values()))
            hidden = [text for text in HIDDEN if unquote(text) in values]
            async with relay_of(launchdarkly, tmp_path, **variables) as relay:
                await relay.said("Error initializing LaunchDarkly client", 1 if left_out else 2)
                await relay.said("is unavailable: the server refuses user or password", 2)
                printed = await everything_asked(relay, hidden)
                await relay.stop()
            for secret in hidden:
                assert secret not in relay.log + printed, secret
            assert relay.log.count("DEBUG: Request: ") > 10


async def everything_asked(relay: RelayProcess, hidden: Iterable[str]) -> str:
    """Send each secret in each place where a request may have one; return the public responses."""
    for secret in hidden:
        for path in (
            "/sdk/flags",
            "/sdk/evalx/contexts/x",
            "/mobile",
            "/nowhere",
            f"/sdk/flags/{secret}",
        ):
            escaped = path.replace(" ", "%20")
            for method in ("GET", "POST"):
                await ask(relay.address, escaped, [("Authorization", secret)], method=method)
        await ask(relay.address, f"/all?auth={secret.replace(' ', '+')}")
    health = ("/status", "/status/main", "/readyz", "/startupz", "/readyz/odd")
    return "".join([(await ask(relay.address, path)).body.decode() for path in health])
