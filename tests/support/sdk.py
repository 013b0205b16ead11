"""LaunchDarkly's SDKs, unmodified, behind one face: Python here, others in a process beside."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, Protocol, Self, cast

from ld_openfeature import LaunchDarklyProvider
from ldclient import Context, LDClient
from ldclient.async_client import AsyncLDClient
from ldclient.async_config import AsyncConfig, AsyncDataSystemConfig
from ldclient.config import BigSegmentsConfig, Config, DataSystemConfig, HTTPConfig
from ldclient.datasystem import (
    default,
    fdv1_fallback_ds_builder,
    polling,
    polling_ds_builder,
    streaming,
)
from ldclient.feature_store import CacheConfig
from ldclient.impl.aio.concurrency import AsyncEvent
from ldclient.impl.datasource.async_feature_requester import AsyncFeatureRequesterImpl
from ldclient.impl.datasource.async_polling import AsyncPollingUpdateProcessor
from ldclient.impl.datasource.feature_requester import FeatureRequesterImpl
from ldclient.impl.datasource.polling import PollingUpdateProcessor
from ldclient.impl.datasourcev2.async_polling import (
    AsyncFallbackToFDv1PollingDataSourceBuilder,
    AsyncPollingDataSourceBuilder,
)
from ldclient.impl.datasourcev2.async_streaming import AsyncStreamingDataSourceBuilder
from ldclient.impl.retry import for_polling
from ldclient.integrations import DynamoDB, Redis
from ldclient.interfaces import (
    AsyncFeatureStore,
    AsyncUpdateProcessor,
    FeatureStore,
    UpdateProcessor,
)
from openfeature import api as openfeature
from openfeature.evaluation_context import EvaluationContext

from tests.support.data import flag, segment

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ROOT / "tests/sdk-node"
OLDER_PYTHON = ROOT / "tests/sdk-python"
EDGE_PACKAGES = ROOT / "tests/sdk-edge"
EDGE_SDKS = ["cloudflare", "vercel"]
PATIENCE = 10.0
"""Seconds that a wait may take before the test fails."""
MIN_POLL_INTERVAL = 30.0
"""Seconds; of all SDKs. Below it Python gets the SDK's poller with another interval, and Node's
clock runs faster."""
SOMEBODY = {"kind": "user", "key": "somebody"}
ANNA = {"kind": "user", "key": "anna"}
_domains = itertools.count()


class SDKFailed(Exception):
    """The SDK says that it failed for good."""


@dataclass(frozen=True)
class Setup:
    """Configuration of an SDK; the same for all languages.

    Args:
        url: of the relay; empty with `redis` or `dynamodb`.
        stream: False for polling.
        poll_interval: seconds; less than users can choose, whose SDKs enforce `MIN_POLL_INTERVAL`.
        redis: URL of the database to read in daemon mode.
        dynamodb: URL of the service to read in daemon mode; the older Node SDK and Python only.
        table: name of the table there.
        prefix: of the keys there.
        ca: file of the certificate authority to trust.
        payload_filter: key of the payload filter whose part of the data it gets; Python only.
        fdv2: how to ask by the newer protocol: `default` polls first and then streams, `streaming`
            and `polling` do nothing else; empty for the older one.
        openfeature: evaluate through the OpenFeature provider.
        events: send events, and diagnostics.
        compressed: send events in gzip.
        bootstrap: the flags of a client-side SDK, which then asks for none; without, it streams.
        context: whom a client-side SDK serves from its start.
        proof: the hash of secure mode, for a client-side SDK.
        more: options of the Node client SDK, by its own names for them.
    """

    key: str
    url: str = ""
    stream: bool = True
    poll_interval: float = MIN_POLL_INTERVAL
    redis: str = ""
    dynamodb: str = ""
    table: str = ""
    prefix: str = "launchdarkly"
    ca: str = ""
    payload_filter: str = ""
    fdv2: str = ""
    openfeature: bool = False
    events: bool = False
    compressed: bool = False
    bootstrap: dict | None = None
    context: dict | None = None
    proof: str = ""
    more: dict | None = None


class SDK(Protocol):
    """One SDK instance; left, it is closed."""

    async def ready(self) -> None:
        """Wait until it has initialised.

        Raises:
            SDKFailed: it gave up.
        """

    async def value(self, flag: str, context: dict = SOMEBODY, fallback: Any = None) -> Any:
        """Evaluate a flag."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


async def sees(
    sdk: SDK, flag: str, value: Any, context: dict = SOMEBODY, seconds: float = PATIENCE
) -> None:
    """Wait until an SDK evaluates a flag to `value`."""
    seen = None
    try:
        async with asyncio.timeout(seconds):
            while (seen := await sdk.value(flag, context, "(none)")) != value:  # noqa: ASYNC110 - an SDK tells nobody
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{flag} is still {seen!r}, not {value!r}") from None


IN_CROWD = [{"attribute": "", "op": "segmentMatch", "values": ["crowd"]}]
EVERYTHING = [
    flag("lamp", value="on"),
    flag("text", value='U+2028 \u2028 and "quotes" and ü'),
    flag("big", value=9007199254740991),
    flag("tiny", value=1.5e-7),
    flag("tree", value={"a": [1, {"b": None}], "c": ""}),
    flag("for-crowd", value="crowd", rules=[{"variation": 0, "clauses": IN_CROWD}])
    | {"variations": ["crowd", "others"], "fallthrough": {"variation": 1}},
    flag("needs-lamp", value="lit", prerequisites=[{"key": "lamp", "variation": 0}]),
    flag("needs-none", value="never", prerequisites=[{"key": "missing", "variation": 0}])
    | {"variations": ["never", "off"]},
    segment("crowd", included=["anna"]),
]
"""Values that are easily damaged, a segment that a flag needs, and prerequisites."""


async def evaluates_everything(sdk: SDK, *, texts_only: bool = False) -> None:
    """See that an SDK has `EVERYTHING`, unharmed; an OpenFeature provider is asked for texts."""
    for item in EVERYTHING[: 2 if texts_only else 5]:
        value = item["variations"][0]
        assert json.dumps(await sdk.value(item["key"], fallback="(none)")) == json.dumps(value)
    assert await sdk.value("for-crowd", ANNA, "(none)") == "crowd"
    assert await sdk.value("for-crowd", fallback="(none)") == "others"
    assert await sdk.value("needs-lamp", fallback="(none)") == "lit"
    assert await sdk.value("needs-none", fallback="(none)") == "off"
    assert await sdk.value("missing", fallback="fallback") == "fallback"


class PythonSDK:
    """`launchdarkly-server-sdk` in this process; its calls block, so they run in threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._client: LDClient | None = None
        self._domain = f"test-{next(_domains)}"

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._close)

    async def ready(self) -> None:
        assert self._client is not None
        async with asyncio.timeout(PATIENCE):
            while not self._client.is_initialized():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def track(self, event: str, context: dict, data: Any) -> None:
        assert self._client is not None
        self._client.track(event, Context.from_dict(context), data)

    async def identify(self, context: dict) -> None:
        assert self._client is not None
        self._client.identify(Context.from_dict(context))

    async def flush(self) -> None:
        assert self._client is not None
        self._client.flush()

    async def value(self, flag: str, context: dict = SOMEBODY, fallback: Any = None) -> Any:
        evaluate = self._by_openfeature if self._setup.openfeature else self._directly
        return await asyncio.to_thread(evaluate, flag, context, fallback)

    def _directly(self, flag: str, context: dict, fallback: Any) -> Any:
        assert self._client is not None
        return self._client.variation(flag, Context.from_dict(context), fallback)

    def _by_openfeature(self, flag: str, context: dict, fallback: Any) -> Any:
        attributes = {name: value for name, value in context.items() if name != "key"}
        asked = EvaluationContext(context["key"], attributes)
        return openfeature.get_client(self._domain).get_string_value(flag, fallback, asked)

    def _start(self) -> None:
        setup = self._setup
        options: dict[str, Any] = {"stream": setup.stream, "send_events": setup.events}
        options["enable_event_compression"] = setup.compressed
        if setup.payload_filter:
            options["payload_filter_key"] = setup.payload_filter
        if setup.redis:
            store = Redis.new_feature_store(
                setup.redis, setup.prefix, caching=CacheConfig.disabled()
            )
            members = BigSegmentsConfig(Redis.new_big_segment_store(setup.redis, setup.prefix))
            options |= {"use_ldd": True, "feature_store": store, "big_segments": members}
        if setup.dynamodb:
            where = {"endpoint_url": setup.dynamodb}
            store = DynamoDB.new_feature_store(
                setup.table, setup.prefix, where, caching=CacheConfig.disabled()
            )
            members = BigSegmentsConfig(
                DynamoDB.new_big_segment_store(setup.table, setup.prefix, where)
            )
            options |= {"use_ldd": True, "feature_store": store, "big_segments": members}
        if setup.url:
            options |= dict.fromkeys(("base_uri", "stream_uri", "events_uri"), setup.url)
        if not setup.stream and setup.poll_interval < MIN_POLL_INTERVAL:
            options["update_processor_class"] = self._polls
        if setup.fdv2:
            options["datasystem_config"] = _data_system(setup)
        config = Config(
            setup.key,
            http=HTTPConfig(ca_certs=setup.ca or None),
            initial_reconnect_delay=0.1,
            diagnostic_opt_out=not setup.events,
            **options,
        )
        if setup.openfeature:
            provider = LaunchDarklyProvider(config)
            openfeature.set_provider_and_wait(provider, self._domain)
            self._client = provider.__dict__["_LaunchDarklyProvider__client"]
        else:
            self._client = LDClient(config, start_wait=0)

    def _polls(self, config: Config, store: FeatureStore, ready: Event) -> UpdateProcessor:
        """The SDK's own poller; the minimum is in its configuration."""
        every = for_polling(self._setup.poll_interval)
        return PollingUpdateProcessor(config, FeatureRequesterImpl(config), store, ready, every)

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()


def _data_system(setup: Setup) -> DataSystemConfig:
    fallback = fdv1_fallback_ds_builder().poll_interval(setup.poll_interval)
    poll = polling_ds_builder().poll_interval(setup.poll_interval)
    builders = {"default": default, "streaming": streaming, "polling": polling}
    builder = builders[setup.fdv2]().fdv1_compatible_synchronizer(fallback)
    if setup.fdv2 == "polling":
        builder.synchronizers(poll)
    return builder.build()


def _async_data_system(setup: Setup) -> AsyncDataSystemConfig:
    fallback = AsyncFallbackToFDv1PollingDataSourceBuilder().poll_interval(setup.poll_interval)
    poll = AsyncPollingDataSourceBuilder().poll_interval(setup.poll_interval)
    stream = AsyncStreamingDataSourceBuilder()
    return AsyncDataSystemConfig(
        initializers=[poll] if setup.fdv2 == "default" else None,
        synchronizers=[
            *([] if setup.fdv2 == "polling" else [stream]),
            *([] if setup.fdv2 == "streaming" else [poll]),
        ],
        fdv1_fallback_synchronizer=fallback,
    )


class AsyncPythonSDK:
    """The asynchronous client of the same package: aiohttp below, and it offers gzip for streams."""

    def __init__(self, setup: Setup) -> None:
        assert not setup.openfeature, "there is no asynchronous provider"
        assert not setup.dynamodb, "it wants another library"
        options: dict[str, Any] = {"stream": setup.stream, "send_events": setup.events}
        options["enable_event_compression"] = setup.compressed
        self._end = AsyncExitStack()
        if setup.redis:
            store = Redis.async_feature_store(
                setup.redis, setup.prefix, caching=CacheConfig.disabled()
            )
            members = BigSegmentsConfig(Redis.async_big_segment_store(setup.redis, setup.prefix))
            options |= {"use_ldd": True, "feature_store": store, "big_segments": members}
            self._end.push_async_callback(store.close)  # the client leaves it open
        if setup.url:
            options |= dict.fromkeys(("base_uri", "stream_uri", "events_uri"), setup.url)
        if not setup.stream and setup.poll_interval < MIN_POLL_INTERVAL:
            options["update_processor_class"] = self._polls
        if setup.fdv2:
            options["datasystem_config"] = _async_data_system(setup)
        config = AsyncConfig(
            setup.key,
            http=HTTPConfig(ca_certs=setup.ca or None),
            initial_reconnect_delay=0.1,
            diagnostic_opt_out=not setup.events,
            **options,
        )
        self._setup = setup
        self._client = AsyncLDClient(config)

    async def __aenter__(self) -> Self:
        self._end.push_async_callback(self._client.close)
        await self._client.start(start_wait=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end.aclose()

    async def ready(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await self._client.is_initialized():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def track(self, event: str, context: dict, data: Any) -> None:
        self._client.track(event, Context.from_dict(context), data)

    async def identify(self, context: dict) -> None:
        self._client.identify(Context.from_dict(context))

    async def flush(self) -> None:
        await self._client.flush()

    async def value(self, flag: str, context: dict = SOMEBODY, fallback: Any = None) -> Any:
        return await self._client.variation(flag, Context.from_dict(context), fallback)

    def _polls(
        self, config: AsyncConfig, store: AsyncFeatureStore, ready: AsyncEvent
    ) -> AsyncUpdateProcessor:
        """The SDK's own poller; the minimum is in its configuration."""
        every = for_polling(self._setup.poll_interval)
        requester = AsyncFeatureRequesterImpl(config)
        return AsyncPollingUpdateProcessor(config, requester, store, ready, every)


class DrivenSDK:
    """An SDK in a process of its own, driven by JSON lines.

    Args:
        line: which one the process is to make.
        setup: how it is configured.
    """

    command: ClassVar[tuple[str, ...]]
    """Program that makes it, and its arguments."""
    environment: ClassVar[Mapping[str, str] | None] = None
    """Environment of the program; None for that of this process."""

    def __init__(self, line: str, setup: Setup) -> None:
        self._line = line
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._asked = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        try:
            await self._ask("init", line=self._line, **asdict(self._setup))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._ask("close")
        finally:
            await self._end()

    async def ready(self) -> None:
        await self._ask("ready")

    async def track(self, event: str, context: dict, data: Any) -> None:
        await self._ask("track", event=event, context=context, data=data)

    async def identify(self, context: dict) -> None:
        await self._ask("identify", context=context)

    async def flush(self) -> None:
        await self._ask("flush")

    async def value(self, flag: str, context: dict = SOMEBODY, fallback: Any = None) -> Any:
        return await self._ask("value", flag=flag, context=context, fallback=fallback)

    async def _ask(self, operation: str, **what: Any) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._asked, asyncio.timeout(PATIENCE):
            self._process.stdin.write(json.dumps({"operation": operation, **what}).encode() + b"\n")
            answer = json.loads(await self._process.stdout.readline())
        if "error" in answer:
            raise SDKFailed(answer["error"])
        return answer["result"]

    async def _end(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class NodeSDK(DrivenSDK):
    """A Node SDK (tests/sdk-node/driver.mjs).

    Args:
        line: of the SDK: `9` is the current one of servers, `7` the one before; `client` is for
            programs on desktops, `browser` the current one of browsers. The latter two know only
            the context that they serve; `identify` changes it.
        setup: how it is configured.
    """

    command = "node", str(PACKAGES / "driver.mjs")

    def __init__(self, line: str, setup: Setup) -> None:
        client_side = line in CLIENT_SIDE_SDKS
        assert line != "browser" or setup.bootstrap is not None, "it streams in a browser only"
        assert client_side == (setup.context is not None), "client-side SDKs serve one context"
        assert line == "9" or not setup.compressed, "the others cannot"
        assert line == "7" or not setup.dynamodb, "its package for DynamoDB is not at hand"
        others = setup.redis or setup.ca or setup.fdv2 or setup.openfeature
        assert not (client_side and others), "not driven by this class"
        super().__init__(line, setup)


class OlderPythonSDK(DrivenSDK):
    """The Python SDK as it was before: the classes above, with its package (tests/sdk-python).

    Args:
        line: `python` or `python-async`.
        setup: how it is configured.
    """

    command = sys.executable, str(OLDER_PYTHON / "driver.py")
    environment: ClassVar[Mapping[str, str]] = {
        **os.environ,
        "PYTHONPATH": f"{OLDER_PYTHON / 'packages'}{os.pathsep}{ROOT}",
    }


def make(name: str, setup: Setup) -> SDK:
    """Return the SDK of a name in one of the lists below; enter it to start it."""
    match name:
        case "python":
            return PythonSDK(setup)
        case "python-async":
            return AsyncPythonSDK(setup)
        case "python9.18" | "python9.18-async":
            return OlderPythonSDK(name.replace("9.18", ""), setup)
    return NodeSDK(name.removeprefix("node"), setup)


SDKS = ["python", "python-async", "node9", "node7"]
CLIENT_SIDE_SDKS = ["client", "browser"]
FDV2_SDKS = ["python", "python-async", "node9"]
"""Those that can be configured for FDv2."""
OLDER_FDV2_SDKS = ["python9.18", "python9.18-async"]
"""The same, of older releases; `install_older_python` has to be called before."""


def install_packages(folder: Path = PACKAGES) -> None:
    """Install the npm packages of a folder, once, however many workers want them."""
    lock = folder / "package-lock.json"
    done = folder / "node_modules/.package-lock.json"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
            subprocess.run([ROOT / "scripts/node-packages", folder], check=True, timeout=300)
            done.touch()


def install_older_python() -> str:
    """Install the older Python SDK beside the present one, once; return why it is not possible."""
    lock, done = OLDER_PYTHON / "requirements.lock", OLDER_PYTHON / "packages/.installed"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if done.exists() and done.stat().st_mtime >= lock.stat().st_mtime:
            return ""
        script = ROOT / "scripts/python-packages"
        installed = subprocess.run(
            [sys.executable, script, OLDER_PYTHON],
            check=False,
            timeout=120,
            capture_output=True,
            text=True,
        )
        if installed.returncode == 0:
            done.touch()
            return ""
    return f"the older Python SDK cannot be installed: {installed.stderr.strip()[-300:]}"


async def evaluated_at_the_edge(
    sdk: str, client_side_id: str, values: dict[str, str], evaluations: list[tuple[str, dict]]
) -> list[Any]:
    """Evaluate flags with one of `EDGE_SDKS`.

    Args:
        sdk: Cloudflare's runs in Cloudflare's runtime, Vercel's with Vercel's client.
        client_side_id: of the environment.
        values: texts of the key-value store by key.
        evaluations: each flag with a context.
    """
    what = {"sdk": sdk, "id": client_side_id, "values": values, "evaluations": evaluations}
    process = await asyncio.create_subprocess_exec(
        "node",
        "driver.mjs",
        cwd=EDGE_PACKAGES,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate(json.dumps(what).encode())
    return cast("list[Any]", json.loads(output))
