"""The image's promises, kept by the same files and the same command without a container.

The layout, the command and the variables are those of the Dockerfile. As far as the machine allows
it runs as the image's user, or as any other with group 0; they can write only in the volume.
"""

from __future__ import annotations

import asyncio
import compileall
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from tests.support.data import all_data, flag
from tests.support.process import PATIENCE, ROOT, RelayProcess
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream

BECOME = """
import os, sys
user, group = map(int, sys.argv[1].split(":"))
os.setgroups([])
os.setgid(group)
os.setuid(user)
os.umask(0o022)
os.execv(sys.argv[2], sys.argv[2:])
"""
PACKAGES = sysconfig.get_path("purelib")
DOCKERFILE = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())


def run_as(user: str) -> Sequence[str]:
    """Prefix that makes root's command that of a user, such as `1000:1000`."""
    return (sys.executable, "-c", BECOME, user)


def instruction(word: str) -> str:
    """The argument of the last such instruction of the Dockerfile."""
    return re.findall(rf"(?m)^{word} (.*)$", DOCKERFILE)[-1]


@dataclass
class Image:
    """Files as in the image, below a folder instead of `/`.

    Args:
        root: stands for `/`.
        python: the interpreter.
        runs_as: user and group; empty for whoever runs the tests.
    """

    root: Path
    python: str
    runs_as: str = ""

    def build(self) -> None:
        """Do what the Dockerfile does."""
        packages, command = self.root / "opt/relay/lib", self.root / "opt/relay/bin/relay"
        shutil.copytree(ROOT / "relay", packages / "relay", ignore=lambda *_: ["__pycache__"])
        compileall.compile_dir(
            packages, quiet=1, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        )
        [script] = re.findall(r"printf '(#!.*?)'", DOCKERFILE)
        command.parent.mkdir()
        command.write_text(
            script.replace(r"\n", "\n").replace("/opt/relay/bin/python", self.python)
        )
        command.chmod(0o755)
        for link in re.findall(r"ln -s /opt/relay/bin/relay (\S+)", DOCKERFILE):
            self.path(link).parent.mkdir(parents=True, exist_ok=True)
            self.path(link).symlink_to(command)
        self.path("/data").mkdir()
        self.path("/ldr").mkdir()
        for path in [self.root, *self.root.rglob("*")]:
            if not path.is_symlink() and path != self.path("/data"):
                path.chmod(path.stat().st_mode & ~0o222 | 0o444)
        owner, group, mode = re.findall(r"install -d -o (\d+) -g (\d+) -m (\d+) /data", DOCKERFILE)[
            0
        ]
        if self.runs_as:
            os.chown(self.path("/data"), int(owner), int(group))
        self.path("/data").chmod(int(mode, 8))

    def path(self, absolute: str) -> Path:
        """Where a path of the image is."""
        return self.root / absolute.lstrip("/")

    def command(self, word: str) -> list[str]:
        """The command of `ENTRYPOINT` or `HEALTHCHECK`, as the user."""
        name, *arguments = json.loads("[" + instruction(word).partition("[")[2])
        program = self.path(f"/usr/bin/{Path(name).name}")
        paths = [str(self.path(each)) if each.startswith("/") else each for each in arguments]
        return [*(run_as(self.runs_as) if self.runs_as else ()), str(program), *paths]

    def variables(self) -> dict[str, str]:
        """Those of `ENV`, and what leads this Python to the packages."""
        given = dict(each.split("=", 1) for each in shlex.split(instruction("ENV")))
        assert given.pop("PORT") == "8030"
        for name in ("SNAPSHOT_DIR", "EVENTS_SPOOL_DIR"):
            given[name] = str(self.path(given[name]))
        return {**given, "PYTHONPATH": f"{self.path('/opt/relay/lib')}:{PACKAGES}"}

    def files(self) -> set[tuple[str, int]]:
        """Everything outside the volume, with the time of its last change."""
        return {
            (str(path), path.lstat().st_mtime_ns)
            for path in self.root.rglob("*")
            if self.path("/data") not in (path, *path.parents)
        }

    def healthy(self, port: int) -> int:
        """Run the health check; return its exit code."""
        variables = {"PORT": str(port), "PATH": os.environ["PATH"], **self.variables()}
        done = subprocess.run(
            self.command("HEALTHCHECK"),
            env=variables,
            check=False,
            timeout=PATIENCE,
            cwd=self.root,
        )
        return done.returncode


def usable(python: str) -> bool:
    """True if the image's user may run a Python, with the packages that are installed here."""
    environ = {"PYTHONPATH": PACKAGES, "PATH": ""}
    done = subprocess.run(
        [*run_as(instruction("USER")), python, "-c", "import aiohttp, uvloop"],
        env=environ,
        cwd="/",
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=PATIENCE,
    )
    return done.returncode == 0


@pytest.fixture(name="image", scope="module")
def built_image() -> Iterator[Image]:
    """An image. A temporary folder of pytest would be closed to user 1000."""
    pythons = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    with tempfile.TemporaryDirectory() as folder:
        image = Image(Path(folder).resolve(), sys.executable)
        if os.getuid() == 0:
            image.root.chmod(0o755)
            found = [python for python in pythons if usable(python)]
            if found:
                image.python, image.runs_as = found[0], instruction("USER")
        image.build()
        yield image
        for path in [image.root, *image.root.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)


class Container(RelayProcess):
    """A relay that runs by the image's command."""

    def __init__(self, image: Image, folder: Path, **variables: str) -> None:
        super().__init__(folder, "--from-env", **image.variables(), **variables)
        *self.command, last = image.command("ENTRYPOINT")
        assert last == "--from-env"
        self.cwd = image.root


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp")))
        yield upstream


async def status(relay: RelayProcess) -> int:
    return (await ask(relay.address, "/sdk/flags", [("Authorization", SDK_KEY)])).status


async def test_it_needs_nothing_but_variables_and_writes_nothing_but_its_volume(
    image, upstream, tmp_path
):
    """No file, no home, nothing that can be written: it serves, is healthy, and ends with 0."""
    before = image.files()
    variables = {"LD_ENV_main": SDK_KEY, "STREAM_URI": upstream.url}
    async with Container(image, tmp_path, **variables) as relay:
        await relay.said("Initialized")
        assert "with configuration from environment variables\n" in relay.log
        assert await status(relay) == 200
        assert await asyncio.to_thread(image.healthy, relay.port) == 0
        assert await relay.stop() == 0
        [snapshot] = image.path("/data/snapshots").iterdir()
        assert snapshot.stat().st_mode & 0o007 == 0
        user = image.runs_as.partition(":")[0]
        assert snapshot.stat().st_uid == (int(user) if user else os.getuid())
        assert image.files() == before
        assert await asyncio.to_thread(image.healthy, relay.port) == 1

        await upstream.stop()
        await relay.start()
        await relay.said("Serving stored data (1 items) until upstream delivers")
        assert await status(relay) == 200
        assert await asyncio.to_thread(image.healthy, relay.port) == 0
        assert await relay.stop() == 0
    assert "Traceback" not in relay.log
    assert image.files() == before


async def test_any_user_of_group_0_keeps_snapshots_and_events(image, upstream, tmp_path):
    """As OpenShift runs it: each may follow the image's own, and any other."""
    if not image.runs_as:
        pytest.skip("only root can become somebody else")
    own, before = image.runs_as, image.files()
    variables = {
        "LD_ENV_main": SDK_KEY,
        "STREAM_URI": upstream.url,
        "USE_EVENTS": "true",
        "EVENTS_HOST": "http://127.0.0.1:1",
    }
    sdk = [("Authorization", SDK_KEY), ("Content-Type", "application/json")]
    try:
        for number, user in enumerate((own, "12345:0", "1000650000:0")):
            image.runs_as = user
            if number:  # upstream may be faster than the disk
                await upstream.stop()
            async with Container(image, tmp_path, **variables) as relay:
                if number:
                    await relay.said("Serving stored data (1 items)")
                    await upstream.start()
                await relay.said("Initialized")
                event = b'[{"kind":"custom","key":"k%d","context":{"key":"a"}}]' % number
                assert (
                    await ask(relay.address, "/bulk", sdk, method="POST", body=event)
                ).status == 202
                assert await asyncio.to_thread(image.healthy, relay.port) == 0
                assert await relay.stop() == 0
            assert "Permission denied" not in relay.log
            assert "memory" not in relay.log
            for path in image.path("/data").rglob("*"):
                found = path.stat()
                assert found.st_gid == 0
                assert found.st_mode & 0o007 == 0
        [database] = image.path("/data/events").glob("*.db")
        with closing(sqlite3.connect(database)) as events:
            assert events.execute("SELECT count(*) FROM posts").fetchone() == (3,)
        assert image.files() == before
    finally:
        image.runs_as = own


async def test_a_mounted_file_is_read_with_variables_above_it(image, upstream, tmp_path):
    """As with the image that this one replaces."""
    file = image.path("/ldr/ld-relay.conf")
    file.parent.chmod(0o755)
    file.write_text(
        f'[Main]\nstreamUri = {upstream.url}\n[Environment "main"]\nsdkKey = sdk-other\n'
    )
    try:
        async with Container(image, tmp_path, LD_ENV_main=SDK_KEY) as relay:
            await relay.said("Initialized")
            assert f"with configuration file {file} plus environment variables\n" in relay.log
            assert await status(relay) == 200
    finally:
        file.unlink()
