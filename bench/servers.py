"""The servers that are compared: relays, started by a command line, and nginx."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import data
from bench.machine import ROOT, SERVER_CORE, Process
from bench.polls import Client
from bench.upstream import AUTO_CONFIG_KEY, Upstream

SDK_KEY = "sdk-bench-main"
SMALL_SDK_KEY = "sdk-bench-small"
HEADERS = {"Authorization": SDK_KEY}
POLL = "/sdk/flags"
OWN_COMMAND = f"{shlex.quote(sys.executable)} -m relay --from-env"
START_SECONDS = 30


@dataclass(frozen=True)
class Session:
    """A server that runs, and what feeds it."""

    process: Process
    started: float
    """CLOCK_MONOTONIC time just before exec."""
    port: int
    scheme: str
    upstream: Upstream | None

    def url(self, path: str = POLL) -> str:
        """The address of a path."""
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def client(self, sdk_key: str = SDK_KEY, **headers: str) -> Client:
        """A polling client with a credential."""
        return Client(self.url(""), {"Authorization": sdk_key, **headers})

    def await_status(self, path: str = POLL, pause: float = 0.02, size: int = 0) -> float:
        """Wait for a 200 with at least `size` bytes; return the time when it was read whole."""
        client = self.client()
        until = time.monotonic() + START_SECONDS
        last: object = "nothing"
        while time.monotonic() < until and self.process.running():
            try:
                response = client.get(path)
            except OSError as error:
                last = error
            else:
                last = f"{response.status} with {len(response.body)} bytes"
                if response.status == 200 and len(response.body) >= size:
                    client.close()
                    return time.monotonic()
            time.sleep(pause)
        raise RuntimeError(f"{self.url(path)} does not serve: {last}")


@dataclass(frozen=True)
class Relay:
    """A relay started by a command line and the reference relay's environment variables."""

    name: str
    command: str
    variables: Mapping[str, str] = field(default_factory=dict)
    cores: Sequence[int] = (SERVER_CORE,)

    @contextmanager
    def serve(
        self,
        dataset: str,
        tls: "Certificate | None" = None,
        *,
        events: bool = False,
        latency: float = 0.0,
        automatic: int = 0,
    ) -> Iterator[Session]:
        """Run it on a free port with two environments: `dataset`, and one of 2 KB.

        With `events` it forwards them to the upstream's mailbox. A round trip to the upstream
        takes `latency` seconds. With `automatic` it is told its environments by the upstream:
        so many, all with `dataset`, whose keys are `sdk_keys(automatic)`.
        """
        environments = (
            dict.fromkeys(sdk_keys(automatic), dataset)
            if automatic
            else {SDK_KEY: dataset, SMALL_SDK_KEY: "2k"}
        )
        which = (
            {"AUTO_CONFIG_KEY": AUTO_CONFIG_KEY}
            if automatic
            else {"LD_ENV_main": SDK_KEY, "LD_ENV_small": SMALL_SDK_KEY}
        )
        with (
            Upstream(environments, latency) as upstream,
            self.follow(upstream, which, tls, events=events) as session,
        ):
            yield session

    @contextmanager
    def follow(
        self,
        upstream: Upstream,
        which: Mapping[str, str],
        tls: "Certificate | None" = None,
        *,
        events: bool = False,
        port: int = 0,
    ) -> Iterator[Session]:
        """Run it, on a free port unless one is given, fed by an upstream that others may follow.

        The variables `which` name its environments. With `events` it forwards them to the
        upstream's mailbox.
        """
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as folder,
            (Path(folder) / "log").open("w+b") as log,
        ):
            port = port or free_port()
            env = {**self._environment(upstream.url, port, tls), **which, **self.variables}
            if events:
                env |= {"USE_EVENTS": "true", "EVENTS_HOST": upstream.events_url}
            started = time.monotonic()
            process = Process(shlex.split(self.command), env, Path(folder), log, self.cores)
            scheme = "https" if tls else "http"
            try:
                yield Session(process, started, port, scheme, upstream)
            except Exception as error:
                log.seek(0)
                error.add_note(f"{self.name} said: ...{log.read().decode()[-2000:]}")
                raise
            finally:
                process.stop()

    def _environment(
        self, upstream: str, port: int, tls: "Certificate | None"
    ) -> Mapping[str, str]:
        encrypted = (
            {"TLS_ENABLED": "true", "TLS_CERT": str(tls.certificate), "TLS_KEY": str(tls.key)}
            if tls
            else {}
        )
        return {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": str(ROOT),
            "PORT": str(port),
            "STREAM_URI": upstream,
            "BASE_URI": upstream,
            "CLIENT_SIDE_BASE_URI": upstream,
            "EVENTS_HOST": upstream,
            **encrypted,
        }


def sdk_keys(environments: int) -> list[str]:
    """The keys of so many environments: `SDK_KEY`, and those of numbered ones."""
    return [SDK_KEY, *(f"sdk-bench-{number}" for number in range(1, environments))]


NGINX_CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; etag on; gzip_static on; gzip_vary on;
  keepalive_requests 1000000000; open_file_cache max=10; default_type application/json;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}{ssl}; root {folder}; }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """nginx serving the same bytes as a static file."""

    name: str = "nginx"

    @contextmanager
    def serve(self, dataset: str, tls: "Certificate | None" = None) -> Iterator[Session]:
        """Run it on a free port."""
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder, port = Path(name), free_port()
            folder.chmod(0o755)
            (folder / "sdk").mkdir()
            body = data.compact(data.flags(dataset))
            (folder / "sdk/flags").write_bytes(body)
            subprocess.run(["gzip", "-k", "-6", str(folder / "sdk/flags")], check=True)
            ssl = (
                f" ssl; ssl_certificate {tls.certificate}; ssl_certificate_key {tls.key}"
                if tls
                else ""
            )
            config = folder / "nginx.conf"
            config.write_text(NGINX_CONFIG.format(folder=folder, port=port, ssl=ssl))
            with (folder / "log").open("w+b") as log:
                started = time.monotonic()
                command = ["nginx", "-p", str(folder), "-c", str(config)]
                process = Process(command, os.environ, folder, log)
                try:
                    yield Session(process, started, port, "https" if tls else "http", None)
                finally:
                    process.stop()


Server = Relay | Nginx


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate on disk."""

    certificate: Path
    key: Path


def make_certificate(folder: Path) -> Certificate:
    """Make one for localhost in `folder`, with openssl."""
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    files = ["-subj", "/CN=localhost", "-out", str(made.certificate), "-keyout", str(made.key)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return made


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def has_nginx() -> bool:
    """True if nginx is installed, to compare with."""
    return shutil.which("nginx") is not None
