"""The environments that exist, and the credentials that open them; both change at run time.

Pure but for the time of a look-up: a change returns its consequences, which `relay.relay` carries
out. What is made for an environment or a credential checks `generation`, or the grant itself, and
so dies with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Generic, TypeVar

from msgspec import Struct

from relay import clock
from relay.model.credential import Credential, CredentialKind
from relay.model.environment import EnvironmentSpec

EnvironmentT = TypeVar("EnvironmentT")
"""An environment; only its identity matters here."""


class Grant(Generic[EnvironmentT]):
    """Permission to use an environment with a credential, until it expires or is revoked.

    Everything that was opened with the credential shares the one object.

    Args:
        environment: that is opened.
        credential: that opens it.
        expires_at: Unix time; `math.inf` for never.
    """

    __slots__ = ("credential", "environment", "expires_at", "revoked")

    def __init__(
        self, environment: EnvironmentT, credential: Credential, expires_at: float = math.inf
    ) -> None:
        self.environment = environment
        self.credential = credential
        self.expires_at = expires_at
        self.revoked = False
        """True once the credential no longer opens the environment; for good."""

    def __repr__(self) -> str:
        state = "revoked" if self.revoked else f"until {self.expires_at:.0f}"
        return f"<Grant {self.credential} {state}>"


class RegistryChange(Struct, Generic[EnvironmentT], frozen=True):
    """Consequences of a change.

    Args:
        started: environments that are new.
        stopped: environments that are gone.
        opened: grants that are new.
        closed: grants that were revoked or have expired.
    """

    started: tuple[EnvironmentT, ...] = ()
    stopped: tuple[EnvironmentT, ...] = ()
    opened: tuple[Grant[EnvironmentT], ...] = ()
    closed: tuple[Grant[EnvironmentT], ...] = ()


_Key = tuple[CredentialKind, str, str]
"""Kind and text of a credential, and key of a payload filter."""


class Registry(Generic[EnvironmentT]):
    """All environments and credentials of a relay.

    Args:
        now: returns the Unix time, by which credentials expire.
    """

    def __init__(self, now: Callable[[], float] = clock.now) -> None:
        self._now = now
        self._environments: dict[str, EnvironmentT] = {}
        self.environments: Mapping[str, EnvironmentT] = MappingProxyType(self._environments)
        """The environments by name: a view, which changes with the registry."""
        self._specs: dict[EnvironmentT, EnvironmentSpec] = {}
        self._grants: dict[_Key, Grant[EnvironmentT]] = {}
        self._former: dict[str, EnvironmentSpec] = {}
        """By former name, the spec that the environment has now, or had last."""
        self._expiring: dict[_Key, Grant[EnvironmentT]] = {}
        """The grants that expire at all."""
        self._generation = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change; those who wait for it look at the whole registry later."""
        self._noted_until = math.inf
        """Time of the next expiry that `generation` does not count yet."""

    def __repr__(self) -> str:
        return (
            f"<Registry: {len(self._environments)} environments,"
            f" {len(self._grants)} credentials, generation {self._generation}>"
        )

    @property
    def former_names(self) -> Sequence[str]:
        """Names that environments have had, until they are forgotten or given anew."""
        return tuple(self._former)

    def names(self) -> Sequence[str]:
        """Return the names of all environments, then the former names."""
        return (*self._environments, *self._former)

    @property
    def generation(self) -> int:
        """Number that grows with every change, and with every credential that expires."""
        if self._noted_until is not math.inf and self._now() >= self._noted_until:
            self._changed()
        return self._generation

    @property
    def next_expiry_in(self) -> float | None:
        """Seconds until `expire` has something to do; None for never."""
        expiries = [grant.expires_at for grant in self._expiring.values()]
        return max(0.0, min(expiries) - self._now()) if expiries else None

    @property
    def keys(self) -> frozenset[str]:
        """The texts of all credentials that open an environment."""
        return frozenset(value for _, value, _ in self._grants)

    def find(
        self, kind: CredentialKind, value: str, payload_filter: str = ""
    ) -> EnvironmentT | None:
        """Return the environment that a credential opens; None if it opens none (now).

        Args:
            kind: of the credential.
            value: text of the credential.
            payload_filter: key of a payload filter; empty for all data.
        """
        grant = self.grant(kind, value, payload_filter)
        return None if grant is None else grant.environment

    def grant(
        self, kind: CredentialKind, value: str, payload_filter: str = ""
    ) -> Grant[EnvironmentT] | None:
        """Return the grant of a credential, as `find`: for what lasts longer than a request."""
        grant = self._grants.get((kind, value, payload_filter))
        if grant is None or grant.expires_at is math.inf:
            return grant
        return None if grant.expires_at <= self._now() else grant

    def spec_of(self, name: str) -> EnvironmentSpec | None:
        """Return the spec of the environment that has a name, or had it last."""
        environment = self._environments.get(name)
        return self._former.get(name) if environment is None else self._specs[environment]

    def put(self, environment: EnvironmentT, spec: EnvironmentSpec) -> RegistryChange[EnvironmentT]:
        """Add an environment, or replace its spec: its credentials open it, and no others do.

        A credential that opens another environment (with the same payload filter) leaves that.

        Raises:
            ValueError: another environment has the name; nothing has changed.
        """
        if self._environments.get(spec.name, environment) is not environment:
            raise ValueError(f'there is another environment "{spec.name}"')
        before = self._specs.get(environment)
        opened, moved = self._open(environment, spec)
        if spec == before and not opened:
            return RegistryChange()
        closed: list[Grant[EnvironmentT]] = []
        if before is not None:
            kept = {_key(credential, spec) for credential in spec.credentials}
            closed = self._close(k for k in self._held(environment, before) if k not in kept)
            del self._environments[before.name]
            self._keep_name(before, spec)
        self._environments[spec.name] = environment
        self._specs[environment] = spec
        self._former.pop(spec.name, None)
        self._changed()
        return RegistryChange(
            started=() if before else (environment,),
            opened=tuple(opened),
            closed=(*moved, *closed),
        )

    def remove(self, environment: EnvironmentT) -> RegistryChange[EnvironmentT]:
        """Remove an environment; its name stays known until `forget`."""
        spec = self._specs.pop(environment, None)
        if spec is None:
            return RegistryChange()
        del self._environments[spec.name]
        self._keep_name(spec, spec)
        closed = self._close(self._held(environment, spec))
        self._changed()
        return RegistryChange(stopped=(environment,), closed=tuple(closed))

    def expire(self) -> RegistryChange[EnvironmentT]:
        """Revoke the credentials that have expired; they have not been found since they did."""
        now = self._now()
        closed = self._close([k for k, g in self._expiring.items() if g.expires_at <= now])
        if closed:
            self._changed()
        return RegistryChange(closed=tuple(closed))

    def forget(self, name: str) -> None:
        """Forget a former name."""
        self._former.pop(name, None)

    def renew(self) -> None:
        """Let what was made with the present settings die, as those of the log have changed."""
        self._changed()

    def _keep_name(self, before: EnvironmentSpec, spec: EnvironmentSpec) -> None:
        """Keep the name of a former spec; all former names of an environment follow its spec."""
        self._former[before.name] = before
        for name, former in self._former.items():
            if former is before:
                self._former[name] = spec

    def _open(
        self, environment: EnvironmentT, spec: EnvironmentSpec
    ) -> tuple[list[Grant[EnvironmentT]], list[Grant[EnvironmentT]]]:
        """Let the credentials of a spec open its environment.

        Returns:
            The grants that are new, and those of other environments that end.
        """
        opened, closed = [], []
        for credential, expires_at in spec.credentials.items():
            key = _key(credential, spec)
            grant = self._grants.get(key)
            if grant is None or grant.environment is not environment:
                if expires_at <= self._now():
                    continue
                closed += self._close([key] if grant else [])
                grant = self._grants[key] = Grant(environment, credential)
                opened.append(grant)
            grant.expires_at = expires_at
            if expires_at < math.inf:
                self._expiring[key] = grant
            else:
                self._expiring.pop(key, None)
        return opened, closed

    def _held(self, environment: EnvironmentT, spec: EnvironmentSpec) -> list[_Key]:
        """Return the keys by which an environment is found."""
        keys = (_key(credential, spec) for credential in spec.credentials)
        return [k for k in keys if k in self._grants and self._grants[k].environment is environment]

    def _close(self, keys: Iterable[_Key]) -> list[Grant[EnvironmentT]]:
        closed = []
        for key in keys:
            closed.append(self._grants.pop(key))
            closed[-1].revoked = True
            self._expiring.pop(key, None)
        return closed

    def _changed(self) -> None:
        self._generation += 1
        now = self._now()
        expiries = (grant.expires_at for grant in self._expiring.values())
        self._noted_until = min((at for at in expiries if at > now), default=math.inf)
        self.on_change()


def _key(credential: Credential, spec: EnvironmentSpec) -> _Key:
    return credential.kind, credential.value, spec.payload_filter
