"""The examples run as they are: functions in both languages, the AWS template, Kubernetes' files."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from relay.config.load import load
from relay.config.schema import Config
from tests.support.data import all_data, flag
from tests.support.process import PATIENCE, ROOT, RelayProcess, free_port
from tests.support.redis import RedisServer
from tests.support.sdk import PACKAGES, install_packages
from tests.support.upstream import Posted, ScriptedUpstream

EXAMPLES = ROOT / "examples"
SDK_KEY = "sdk-examples"
PREFIX = "shop"
WAYS = ["streaming", "polling", "daemon"]

# Python runs a signal's handler between two steps of the program: a read that began just before
# the handler's turn would hold it up until the next line.
PYTHON_RUNTIME = """
import importlib, json, select, sys
from ldclient import Context
example = importlib.import_module(sys.argv[1])
while True:
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    line = sys.stdin.readline()
    if not line:
        break
    print(json.dumps(example.handler(json.loads(line), None)), flush=True)
    example.client.track("left over", Context.create("anna"))
    print("at rest", flush=True)
"""
NODE_RUNTIME = """
import { createInterface } from 'node:readline';
const { client, handler } = await import(process.argv[2]);
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await handler(JSON.parse(line))));
  client.track('left over', { kind: 'user', key: 'anna' });
  console.log('at rest');
}
"""


@dataclass(frozen=True)
class Function:
    """One example, ready to run.

    Args:
        program: the command that runs it once by itself.
        runtime: the command that invokes it for each line of its input, as Lambda does, and leaves
            an event behind that is not flushed.
    """

    program: tuple[str, ...]
    runtime: tuple[str, ...]
    folder: Path

    async def start(
        self, command: tuple[str, ...], variables: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            env={"PATH": f"{Path(shutil.which('node') or sys.executable).parent}", **variables},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

    async def run(self, variables: Mapping[str, str]) -> Any:
        """Run it once; return what it prints."""
        process = await self.start(self.program, variables)
        try:
            async with asyncio.timeout(PATIENCE):
                printed, _ = await process.communicate()
        finally:
            await gone(process)
        assert process.returncode == 0
        return json.loads(printed)


async def gone(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@dataclass(frozen=True)
class Place:
    """Surroundings of functions: LaunchDarkly, a relay, a database, and variables to name them."""

    upstream: ScriptedUpstream
    relay: RelayProcess
    redis: RedisServer

    @property
    def variables(self) -> dict[str, str]:
        return variables(self.relay.url, self.redis.url)


def variables(relay: str, redis: str) -> dict[str, str]:
    return {
        "LAUNCHDARKLY_SDK_KEY": SDK_KEY,
        "RELAY_URL": relay,
        "REDIS_URL": redis,
        "REDIS_PREFIX": PREFIX,
        "FLAG_KEY": "lamp",
    }


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["python", "node"])
def language(request) -> str:
    return request.param


@pytest.fixture(params=WAYS)
def function(request, language: str, tmp_path: Path) -> Function:
    """Each example in each language."""
    way = request.param
    if language == "python":
        folder, python = EXAMPLES / "serverless/python", sys.executable
        return Function((python, f"{way}.py"), (python, "-c", PYTHON_RUNTIME, way), folder)
    install_packages()
    folder = tmp_path / "node"
    shutil.copytree(EXAMPLES / "serverless/node", folder)
    (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
    (folder / "runtime.mjs").write_text(NODE_RUNTIME)
    program = str(folder / f"{way}.mjs")
    return Function(("node", program), ("node", "runtime.mjs", program), folder)


@asynccontextmanager
async def placed(folder: Path, redis: RedisServer) -> AsyncGenerator[Place]:
    """Everything there, and the database filled."""
    redis.do("FLUSHALL")
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", value="on")))
        relay = RelayProcess(
            folder,
            LD_ENV_main=SDK_KEY,
            LD_PREFIX_main=PREFIX,
            STREAM_URI=upstream.url,
            EVENTS_HOST=upstream.url,
            EVENTS_FLUSH_INTERVAL="50ms",
            USE_EVENTS="true",
            USE_REDIS="true",
            REDIS_URL=redis.url,
        )
        async with relay:
            await relay.until(lambda: bool(redis.hash(f"{PREFIX}:features")))
            yield Place(upstream, relay, redis)


async def arrived(upstream: ScriptedUpstream, key: str) -> None:
    """Wait until an event of `track` has arrived at LaunchDarkly."""

    def holds(post: Posted) -> bool:
        return post.path == "/bulk" and any(event.get("key") == key for event in post.events)

    await upstream._until(lambda: any(holds(post) for post in upstream.accepted))


@pytest.mark.sdk
async def test_a_function_sees_the_flag_and_its_event_arrives(
    function: Function, tmp_path: Path, redis_server: RedisServer
):
    """Run by itself, each example prints the flag's value, and its event reaches LaunchDarkly."""
    async with placed(tmp_path, redis_server) as place:
        printed = await function.run(place.variables)
        assert printed == {"flag": "lamp", "value": "on", "initialized": True}
        await arrived(place.upstream, "answered")


@pytest.mark.sdk
async def test_sigterm_delivers_what_is_left(
    function: Function, tmp_path: Path, redis_server: RedisServer
):
    """SIGTERM between two invocations ends a function with 0, and no event is lost."""
    async with placed(tmp_path, redis_server) as place:
        process = await function.start(function.runtime, place.variables)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE):
                process.stdin.write(b'{"user": "anna"}\n')
                assert json.loads(await process.stdout.readline())["value"] == "on"
                assert await process.stdout.readline() == b"at rest\n"
                process.terminate()
                assert await process.wait() == 0
        finally:
            await gone(process)
        await arrived(place.upstream, "left over")


@pytest.mark.sdk
async def test_a_function_without_relay_and_database_answers_with_the_default(function: Function):
    """A cold start waits no longer than its limit; then the function works with its default."""
    nobody = free_port()
    printed = await function.run(
        variables(f"http://127.0.0.1:{nobody}", f"redis://127.0.0.1:{nobody}")
    )
    assert printed["flag"] == "lamp"
    assert printed["value"] is None


def test_the_packages_of_node_examples_are_those_that_are_tested():
    """The examples ask for the major versions that these tests run."""
    asked = json.loads((EXAMPLES / "serverless/node/package.json").read_text())["dependencies"]
    tested = json.loads((PACKAGES / "package.json").read_text())["dependencies"]
    assert {name: version.lstrip("^").split(".")[0] for name, version in asked.items()} == {
        name: tested[name].split(".")[0] for name in asked
    }


# AWS


class CloudFormation(yaml.SafeLoader):
    """Reads a template; of a function such as `!Sub` it keeps the argument."""


def _argument(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


CloudFormation.add_multi_constructor("!", _argument)
TEMPLATE = EXAMPLES / "aws/template.yaml"
CFN_LINT = "from cfnlint.runner import main; main()"
IN_IMAGE = dict(re.findall(r"([A-Z_]+)=(/data/\w+)", (ROOT / "Dockerfile").read_text()))
"""Variables that the image sets."""


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """The properties of each resource of the template."""
    template = yaml.load(TEMPLATE.read_text(), CloudFormation)
    return {name: each.get("Properties", {}) for name, each in template["Resources"].items()}


@pytest.fixture(scope="module")
def container(resources) -> dict[str, Any]:
    return resources["RelayTask"]["ContainerDefinitions"][0]


def as_deployed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with something in the place of what CloudFormation fills in."""
    named = {name: re.sub(r"\$\{[^}]*\}", "x", str(value)) for name, value in environment.items()}
    return {name: re.sub(r"\{\{.*?\}\}", "secret", value) for name, value in named.items()}


def configured(environment: Mapping[str, str]) -> Config:
    return load("", from_env=True, allow_missing_file=True, environ=as_deployed(environment))


def relay_variables(container) -> dict[str, str]:
    given = {each["Name"]: each["Value"] for each in container["Environment"]}
    return IN_IMAGE | given | {each["Name"]: "secret" for each in container["Secrets"]}


def test_the_template_passes_cfn_lint():
    """Neither errors nor warnings."""
    done = subprocess.run(
        [sys.executable, "-c", CFN_LINT, "--non-zero-exit-code", "informational", str(TEMPLATE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_relay_and_updater_write_the_same_keys_of_the_same_database(resources, container):
    """Both are configured without a complaint, and alike where it matters."""
    relay = configured(relay_variables(container))
    updater = configured(resources["Updater"]["Environment"]["Variables"])
    assert not relay.warnings
    assert not updater.warnings
    assert relay.redis == updater.redis
    assert relay.environments == updater.environments
    assert relay.events.send_events
    assert updater.webhook.secrets


def test_time_limits_on_aws_fit_each_other(resources, container):
    """No idle stream is cut between heartbeats, and no relay is killed while it ends."""
    relay = configured(relay_variables(container))
    idle = {a["Key"]: a["Value"] for a in resources["Listener"]["ListenerAttributes"]}
    assert float(idle["tcp.idle_timeout.seconds"]) > 2 * relay.main.heartbeat_interval
    assert container["StopTimeout"] > relay.main.graceful_shutdown_timeout
    assert resources["Updater"]["Timeout"] < 30, "API Gateway waits no longer"


def test_the_functions_of_the_template_exist(resources):
    """The handlers are there, and get the variables that they read."""
    module, _, name = resources["Updater"]["Handler"].rpartition(".")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert f"\ndef {name}(" in source.read_text()
    template = yaml.load(TEMPLATE.read_text(), CloudFormation)
    assert template["Parameters"]["Way"]["AllowedValues"] == WAYS
    read = set()
    for way in WAYS:
        text = (EXAMPLES / f"serverless/python/{way}.py").read_text()
        read |= set(re.findall(r'os\.environ(?:\.get\(|\[)"(\w+)"', text))
    assert read == set(resources["Sample"]["Environment"]["Variables"])


def test_the_build_script_is_one():
    """A shell can read it, and what it copies is there."""
    script = EXAMPLES / "aws/build"
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=10)
    assert script.stat().st_mode & 0o111
    named = re.findall(r'"?\$root"?/([\w./-]+)', script.read_text())
    assert named
    assert [name for name in named if not (ROOT / name.removesuffix("/")).exists()] == []


# Kubernetes

KUBERNETES = EXAMPLES / "kubernetes"
OLDEST_KUBERNETES, NEWER_KUBERNETES = "1.30", "1.34"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["endpoints", "selector"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"matchLabels": TEXTS},
                },
                "endpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": r"^([0-9]+m)?([0-9]+s)?$"},
                        },
                    },
                },
            },
        },
    },
}
"""The part of the Prometheus operator's definition that is used here."""


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWER_KUBERNETES])
def test_manifests_fit_the_schemas_of_the_api(version: str):
    """Kubernetes knows every field; unknown ones count as errors."""
    names = ["deployment", "service", "poddisruptionbudget"]
    files = [str(KUBERNETES / f"{name}.yaml") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" passed for resource ") == len(files), done.stdout + done.stderr


def test_the_service_monitor_has_its_shape_and_finds_the_service():
    """It fits its definition, and names the labels and the port that the service has."""
    monitor, service = manifest("servicemonitor"), manifest("service")
    jsonschema.validate(monitor, SERVICE_MONITOR)
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_selectors_find_the_pods_and_kustomization_finds_the_files():
    """Things that belong together are named alike."""
    deployment, kustomization = manifest("deployment"), manifest("kustomization")
    pods = deployment["spec"]["template"]
    labels = pods["metadata"]["labels"].items()
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        manifest("service")["spec"]["selector"],
        manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    others = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == others
    image = pods["spec"]["containers"][0]["image"]
    assert image.partition(":")[0] in {each["name"] for each in kustomization["images"]}


def test_a_pod_is_given_the_time_that_its_end_takes():
    """The grace period holds the pause and the relay's own time, and the relay can be configured."""
    pod = manifest("deployment")["spec"]["template"]["spec"]
    relay = pod["containers"][0]
    given = {each["name"]: each.get("value", "secret") for each in relay["env"]}
    drain = configured(given).main.graceful_shutdown_timeout
    pause = relay["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + drain


async def test_probes_ask_for_what_the_relay_answers(tmp_path: Path):
    """Each path of a probe answers 200 for a relay with flags."""
    relay = manifest("deployment")["spec"]["template"]["spec"]["containers"][0]
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    async with RelayProcess(
        tmp_path, "serve", "--flags", str(ROOT / "config/flags.yaml")
    ) as process:
        await process.said("Initialized")
        for probe in probes:
            path = relay[probe]["httpGet"]["path"]
            request = f"GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n"
            answer = await process.address.ask(request.encode())
            assert answer.startswith(b"HTTP/1.1 200 "), path


# The pages


def pages() -> list[Path]:
    return sorted(EXAMPLES.rglob("README.md"))


def links(page: Path) -> list[Path]:
    found = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    return [page.parent / link for link in found]


def test_links_lead_somewhere():
    """No page names a file that is not there."""
    assert len(pages()) == 4
    assert [str(link) for page in pages() for link in links(page) if not link.exists()] == []


def test_every_example_is_named():
    """Every file of the examples is linked from a page, and every page from the first one."""
    linked = {link.resolve() for page in pages() for link in links(page)}
    known = [
        path
        for path in EXAMPLES.rglob("*")
        if path.is_file()
        and not {"node_modules", "__pycache__", "functions"} & set(path.parts)
        and path.name != ".gitignore"
    ]
    assert [str(path) for path in known if path.resolve() not in linked | {pages()[0]}] == []
    assert {page.resolve() for page in pages()[1:]} <= {
        link.resolve() / "README.md" if link.is_dir() else link.resolve()
        for link in links(EXAMPLES / "README.md")
    }
