"""A plain model of the registry: a table of who opens what, for tests with any sequence of changes."""

from __future__ import annotations

import math

from relay.model.credential import Credential
from relay.model.environment import EnvironmentSpec


class CredentialTable:
    """Environments by credential and payload filter.

    Environments are anything that can be compared.
    """

    def __init__(self) -> None:
        self.specs: dict[object, EnvironmentSpec] = {}
        self._rows: dict[tuple[Credential, str], tuple[object, float]] = {}

    def put(self, environment: object, spec: EnvironmentSpec, now: float) -> None:
        """Let exactly the credentials of a spec open an environment."""
        if self.specs.get(environment) == spec:
            return
        self.specs[environment] = spec
        wanted = {(each, spec.payload_filter): until for each, until in spec.credentials.items()}
        self._rows = {
            row: held for row, held in self._rows.items() if held[0] != environment or row in wanted
        }
        for row, until in wanted.items():
            if until > now or self._rows.get(row, (None,))[0] == environment:
                self._rows[row] = environment, until

    def remove(self, environment: object) -> None:
        self.specs.pop(environment, None)
        self._rows = {row: held for row, held in self._rows.items() if held[0] != environment}

    def find(self, credential: Credential, now: float, payload_filter: str = "") -> object | None:
        environment, until = self._rows.get((credential, payload_filter), (None, math.inf))
        return environment if until > now else None
