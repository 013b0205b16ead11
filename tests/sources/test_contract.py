"""Every data source fulfils the contract."""

from __future__ import annotations

import logging

import pytest

from relay.backoff import Backoff
from relay.errors import ErrorKind
from relay.model.credential import SDKKey
from relay.protocol.fdv1 import parse_archived
from relay.sources import Interrupted, UpToDate
from relay.sources.archive import ArchiveSource
from relay.sources.fdv2 import FDv2Source
from relay.sources.file import FileSource
from relay.sources.polling import PollingSource
from relay.sources.streaming import StreamingSource
from relay.sources.timings import SourceTimings
from relay.upstream import Upstream
from tests.sources.contract import SourceContract
from tests.support import upstream as answers
from tests.support.data import put
from tests.support.fdv2_upstream import FDv2Upstream, event
from tests.support.upstream import ScriptedUpstream

KEY = "sdk-1"
FAST = SourceTimings(
    retry=Backoff(0.01, 0.02),
    confirm_every=0.0,
    poll_interval=0.02,
    file_interval=0.01,
)


class ServerStage:
    def __init__(self, server, source):
        self.server, self.source = server, source

    async def show(self, text):
        await self.server.put(KEY, text)


class StreamStage(ServerStage):
    async def show(self, text):
        if any(request.path == "/all" for request in self.server.requests):
            await self.server.connected(KEY)
        await super().show(text)

    async def spoil(self):
        await self.server.connected(KEY)
        self.server.always(KEY, answers.status(503))
        await self.server.raw(KEY, put("[]"))

    async def restore(self, text):
        self.server.serve(KEY, text)
        self.server.always(KEY, None)

    async def beat(self):
        await self.server.connected(KEY)
        await self.server.raw(KEY, b":\n")


class FDv2Stage(ServerStage):
    async def spoil(self):
        self.server.always(KEY, answers.body(event("put-object", "{oops")))

    restore = StreamStage.restore


class FDv2PollStage(ServerStage):
    async def spoil(self):
        self.server.always(KEY, answers.body(b'{"events":', "application/json"))

    restore = StreamStage.restore


class PollStage(ServerStage):
    async def spoil(self):
        self.server.always(KEY, answers.body(b'{"flags":', "application/json"))

    restore = StreamStage.restore


class FileStage:
    def __init__(self, path):
        self.path, self.source = path, FileSource(path, FAST)

    async def show(self, text):
        self.path.write_text(text)

    async def spoil(self):
        self.path.write_text('{"flags": {')

    restore = show


class ArchiveStage:
    def __init__(self):
        self.source = ArchiveSource()

    async def show(self, text):
        self.source.give(parse_archived(text.encode()))

    async def spoil(self):
        self.source.give(Interrupted(ErrorKind.INVALID_DATA, "unusable"))

    restore = show

    async def beat(self):
        self.source.give(UpToDate())


@pytest.fixture(name="server")
async def scripted_upstream():
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture(name="session")
async def upstream():
    async with Upstream() as session:
        yield session


class TestStreaming(SourceContract):
    @pytest.fixture
    def stage(self, server, session):
        log = logging.getLogger("relay.env.test")
        return StreamStage(server, StreamingSource(session, server.url, SDKKey(KEY), log, FAST))


class TestPolling(SourceContract):
    @pytest.fixture
    def stage(self, server, session):
        return PollStage(server, PollingSource(session, server.url, SDKKey(KEY), FAST))


class TestFDv2(SourceContract):
    @pytest.fixture(params=[FDv2Stage, FDv2PollStage])
    async def stage(self, session, request):
        async with FDv2Upstream() as server:
            streams = server.url if request.param is FDv2Stage else None
            log = logging.getLogger("relay.env.test")
            source = FDv2Source(
                session,
                server.url,
                streams,
                SDKKey(KEY),
                make_fdv1=lambda: StreamingSource(session, server.url, SDKKey(KEY), log, FAST),
                log=log,
                timings=FAST,
            )
            yield request.param(server, source)


class TestFDv1InPlaceOfFDv2(SourceContract):
    """An upstream that does not know FDv2, such as ld-relay 8."""

    @pytest.fixture
    def stage(self, server, session):
        log = logging.getLogger("relay.env.test")
        source = FDv2Source(
            session,
            server.url,
            server.url,
            SDKKey(KEY),
            make_fdv1=lambda: StreamingSource(session, server.url, SDKKey(KEY), log, FAST),
            log=log,
            timings=FAST,
        )
        return StreamStage(server, source)


class TestFile(SourceContract):
    @pytest.fixture
    def stage(self, tmp_path):
        return FileStage(tmp_path / "flags.json")


class TestArchive(SourceContract):
    @pytest.fixture
    def stage(self):
        return ArchiveStage()
