"""Promises of the repository about itself: versions, locks, modules that import alone."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import relay

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "relay").rglob("*.py")
)
LOCKS = [
    "requirements.lock",
    "requirements-dev.lock",
    "tests/sdk-python/requirements.lock",
    "tests/sdk-node/package-lock.json",
    "tests/sdk-edge/package-lock.json",
]


def locked(name: str) -> dict[str, Version]:
    """The versions that a lock file names for this machine's platform, by distribution."""
    lines = re.findall(r"(?m)^([a-z0-9].*?)(?: \\)?$", (ROOT / name).read_text())
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): Version(next(iter(r.specifier)).version)
        for r in requirements
        if r.marker is None or r.marker.evaluate(dict(default_environment()))
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("requirements.lock", PROJECT["dependencies"] + EXTRAS["aws"] + EXTRAS["gcp"]),
        (
            "requirements-dev.lock",
            PROJECT["dependencies"] + [r for e in EXTRAS.values() for r in e],
        ),
    ],
)
def test_a_lock_is_in_step_with_the_project_file(name: str, wanted: list[str]) -> None:
    """Each dependency is locked, at a version within its range."""
    versions = locked(name)
    for requirement in map(Requirement, wanted):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_tests_run_with_the_versions_that_the_program_is_locked_to() -> None:
    """The lock of the tests holds the lock of the program."""
    assert locked("requirements.lock").items() <= locked("requirements-dev.lock").items()


@pytest.mark.parametrize("name", ["tests/sdk-node", "tests/sdk-edge"])
def test_npm_packages_are_locked_as_wanted(name: str) -> None:
    """The npm lock holds what `package.json` asks for, each with a checksum if it is not ours."""
    folder = ROOT / name
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert packages.pop("")["dependencies"] == wanted
    foreign = {name: given for name, given in wanted.items() if not given.startswith("file:")}
    assert {name: packages[f"node_modules/{name}"]["version"] for name in foreign} == foreign
    checked = (p for name, p in packages.items() if name.startswith("node_modules/"))
    assert all("integrity" in package or package.get("link") for package in checked)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_registry(name: str) -> None:
    """Whoever installs chooses the registry; checksums make sure of the content."""
    text = (ROOT / name).read_text()
    assert "--index-url" not in text
    assert "--find-links" not in text
    assert '"resolved"' not in re.sub(r'"resolved": "stubs/[a-z-]+"', "", text)
    without_funding = re.sub(r'"url": "[^"]*"', "", text)
    assert "://" not in without_funding


def test_every_locked_distribution_has_a_checksum() -> None:
    """`pip install --require-hashes` accepts all locks."""
    for name in LOCKS[:3]:
        text = (ROOT / name).read_text()
        heads = re.findall(r"(?m)^[a-z0-9].*$", text)
        assert all(head.endswith("\\") for head in heads)
        assert len(re.findall(r"(?m)^[a-z0-9].*\n    --hash=sha256:", text)) == len(heads)


def test_version_and_changelog_agree() -> None:
    """The newest section of the changelog is the unreleased one or that of this version."""
    headings = re.findall(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text())
    assert headings[0] in {"Unreleased", relay.__version__}
    assert Version(relay.__version__)
    released = [Version(heading) for heading in headings if heading != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert all(Version(relay.__version__) >= version for version in released)


def test_every_module_imports_alone() -> None:
    """No module needs another one to be imported first, and none does anything when imported."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [n for n in sys.modules if n.split('.')[0] == 'relay']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    modules = [name for name in MODULES if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_python_has_an_environment_of_its_own() -> None:
    """Packages of one Python do not pass for another's: `make test PYTHON=…` really runs on that."""
    named = f"PYTHON={sys.executable}"
    for given, folder in ((), ".venv"), ((named,), ".venv-{}.{}".format(*sys.version_info)):
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", "test", *given],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert f"scripts/venv {folder} requirements-dev.lock\n" in done.stdout
        assert f"\n{folder}/bin/mypy\n" in done.stdout
        assert f"\n{folder}/bin/python -m pytest" in done.stdout


def find_python(version: str, path: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/find-python", version],
        env={"PATH": path, "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_python_is_found_that_runs(tmp_path: Path) -> None:
    """A name on the PATH is not enough: it may be a stub, or another version."""
    own = "{}.{}".format(*sys.version_info)
    stub, real, other = (tmp_path / name for name in ("stub", "real", "other"))
    for folder, name, program in (
        (stub, own, "exit 127"),
        (stub, "3.99", "echo not found >&2; exit 127"),
        (other, "3.99", f'exec {sys.executable} "$@"'),
        (real, own, f'exec {sys.executable} "$@"'),
    ):
        folder.mkdir(exist_ok=True)
        file = folder / f"python{name}"
        file.write_text(f"#!/bin/sh\n{program}\n")
        file.chmod(0o755)
    path = f"{stub}:{other}:{real}:/nowhere"
    assert find_python(own, path) == (0, f"{sys.executable}\n")
    assert find_python("3.99", path) == (1, "There is no Python 3.99 here.\n")
