"""Environments of a relay that has several processes."""

from __future__ import annotations

from itertools import count

from relay.bigsegments.environment import BigSegments
from relay.build.databases import make_databases
from relay.build.environments import EnvironmentParts, hub_parts
from relay.build.sources import no_source
from relay.config.schema import Config
from relay.environment import Environment
from relay.model.environment import EnvironmentSpec
from relay.model.journal import Journal
from relay.programs import ProgramCache
from relay.relay import Relay
from relay.sources import DataSource
from relay.stores import Mirror
from relay.streams.hub import Hub
from relay.workers.environments import FedJournal, FeederSource
from relay.workers.hub import SettledPings, WorkerHub, WorkersHub
from relay.workers.link import FeederLink

_numbers = count()


class FeederParts(EnvironmentParts):
    """Makes environments whose streams are open in workers."""

    def environment(self, spec: EnvironmentSpec, source: DataSource | None = None) -> Environment:
        """Return a new environment, which tells the workers of its big segments."""
        environment = super().environment(spec, source)
        if environment.big_segments is not None and isinstance(environment.hub, WorkersHub):
            environment.big_segments.on_status = environment.hub.publish_memberships_status
        return environment

    def _hub(self, programs: ProgramCache, journal: Journal, _big_segments: object) -> Hub:
        return WorkersHub(next(_numbers), programs, journal)


class WorkerParts(EnvironmentParts):
    """Makes environments that get their data from a feeder, which has their mirrors."""

    def change(self, environment: Environment, spec: EnvironmentSpec) -> None:
        """Prepare an environment for another spec: big segments may be elsewhere then."""
        memberships = self.memberships(environment, spec, databases=False)
        if memberships is not None and environment.big_segments is not None:
            environment.big_segments.move(*memberships)

    def _hub(
        self, programs: ProgramCache, journal: Journal, big_segments: BigSegments | None
    ) -> Hub:
        main = self._config.main
        parts = hub_parts(main, programs, journal, big_segments)
        pings = SettledPings(main.ping_stream_jitter_time)
        return WorkerHub(*parts, pings, self.admission)

    def environment(self, spec: EnvironmentSpec, source: DataSource | None = None) -> Environment:
        """Return a new environment, which begins with the feeder's journal.

        The feeder tells which memberships in big segments change, this relay's or another one's.
        """
        environment = super().environment(spec, source)
        if environment.big_segments is not None:
            environment.big_segments.watches_cursor = False
        if isinstance(source, FeederSource):
            environment.mirrors = (FedJournal(source),)
        return environment

    def _mirrors(self, _environment: Environment) -> tuple[Mirror, ...]:
        return ()


def build_worker(config: Config, address: str | bytes, number: int) -> tuple[Relay, FeederLink]:
    """Return the relay of a worker, and its connection to the feeder.

    Args:
        config: of the relay.
        address: of the feeder's socket.
        number: of the worker.

    Raises:
        ConfigError: a resource that it names is unusable.
    """
    parts = WorkerParts(config, no_source, make_databases(config), None, None)
    link = FeederLink(address, number, parts)
    relay = Relay(
        [],
        config.main.init_timeout,
        fetch=link.requests.fetch if config.uses_launchdarkly else None,
        disconnected_after=config.main.disconnected_status_time,
        directory=link,
        reports_starts=False,
        fdv1_fallback=config.main.fdv1_fallback,
        admission=parts.admission,
    )
    return relay, link
