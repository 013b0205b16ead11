"""Formats of streams of evaluated flags. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from relay.evaluation.client import EvalClient
from relay.evaluation.clientjournal import ClientJournal
from relay.evaluation.compiled.flag import CompiledResult
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.compiled.program import Program
from relay.evaluation.data import Membership
from relay.model.answers import AnswerCounter
from relay.model.journal import TOO_OLD
from relay.protocol import clientside, flageval
from relay.protocol.flageval import ClientState


class Opening(NamedTuple):
    """Messages that a client begins with."""

    messages: bytes
    answer: AnswerCounter | None = None
    """Counts them, each time that they are sent; None if they are the same for all."""


class EvalFormat(ABC):
    """Format of streams of evaluated flags."""

    def is_behind(self, basis: str) -> bool:
        """Return whether the data may have yet to reach the state that a client names."""
        del basis
        return False

    @abstractmethod
    def opening(self, program: Program, client: EvalClient, basis: str) -> Opening:
        """Return what a new client gets.

        Args:
            program: to give the results of.
            client: to evaluate for.
            basis: state that it names; empty for none.
        """

    @abstractmethod
    def flags(
        self, program: Program, client: EvalClient, memberships: Mapping[str, Membership]
    ) -> EvalBody:
        """Return all results, as `put` needs them."""

    @abstractmethod
    def put(self, program: Program, client: EvalClient, flags: EvalBody) -> bytes:
        """Return the messages with all results of a program."""

    @abstractmethod
    def changes(
        self,
        program: Program,
        client: EvalClient,
        before: Mapping[str, CompiledResult],
        after: Mapping[str, CompiledResult],
        version: int,
    ) -> bytes:
        """Return the messages for the difference between results; empty if there is none.

        Args:
            program: that `after` are the results of.
            client: to which they belong.
            before: results by flag key; missing keys are not visible to the SDK.
            after: results by flag key.
            version: greater than in all earlier messages.
        """


class EvalxFormat(EvalFormat):
    """Format of `/eval` and `/meval`."""

    def opening(self, program: Program, client: EvalClient, basis: str) -> Opening:
        """Return a put."""
        del basis
        return Opening(self.put(program, client, self.flags(program, client, client.memberships)))

    def flags(
        self, program: Program, client: EvalClient, memberships: Mapping[str, Membership]
    ) -> EvalBody:
        """Return the body of an evalx response."""
        return program.body(client.context, memberships, with_reasons=client.with_reasons)

    def put(self, program: Program, client: EvalClient, flags: EvalBody) -> bytes:
        """Return a put."""
        del program, client
        return clientside.put(b"".join(flags.pieces))

    def changes(
        self,
        program: Program,
        client: EvalClient,
        before: Mapping[str, CompiledResult],
        after: Mapping[str, CompiledResult],
        version: int,
    ) -> bytes:
        """Return patches and deletes."""
        del program
        reasons = client.with_reasons
        was, now = (
            {key: result.entry(with_reasons=reasons) for key, result in results.items()}
            for results in (before, after)
        )
        return clientside.changes(was, now, version)


class FlagEvalFormat(EvalFormat):
    """Format of `/sdk/stream/eval`, whose clients name the state of their data (fdv2 13.8.7).

    Args:
        journal: of what they see.
    """

    def __init__(self, journal: ClientJournal) -> None:
        self._journal = journal

    def is_behind(self, basis: str) -> bool:
        """Return whether the data may have yet to reach the state that a client names."""
        return self._journal.is_behind(ClientState.parse(basis).data)

    def opening(self, program: Program, client: EvalClient, basis: str) -> Opening:
        """Return what the client misses."""
        named = ClientState.parse(basis)
        answer = self._journal.answer(program, client.sdk_kind, named.data)
        transfer = flageval.respond(flageval.STREAM, program, client, named, answer)
        counter = self._journal.counter(
            client.sdk_kind,
            transfer.kind,
            transfer.cause,
            transfer.body.size,
            with_reasons=client.with_reasons,
            everything=lambda: self.flags(program, client, client.memberships).size,
        )
        return Opening(b"".join(transfer.body.pieces), counter)

    def flags(
        self, program: Program, client: EvalClient, memberships: Mapping[str, Membership]
    ) -> EvalBody:
        """Return all objects, without the rest of the transfer."""
        form = flageval.STREAM.form(with_reasons=client.with_reasons)
        return program.fill(form, client.context, memberships)

    def put(self, program: Program, client: EvalClient, flags: EvalBody) -> bytes:
        """Return a transfer of everything."""
        state = ClientState.of(program.selector, client)
        selector = program.selector
        body = flageval.full(flageval.STREAM, selector, flags, state, TOO_OLD)
        return b"".join(body.pieces)

    def changes(
        self,
        program: Program,
        client: EvalClient,
        before: Mapping[str, CompiledResult],
        after: Mapping[str, CompiledResult],
        version: int,
    ) -> bytes:
        """Return a transfer of changes."""
        del version  # clients take what comes, with the version of the flag
        reasons = client.with_reasons
        changed = [
            result
            for key, result in after.items()
            if (known := before.get(key)) is None
            or known.put(with_reasons=reasons) != result.put(with_reasons=reasons)
        ]
        gone = {key: result.version + 1 for key, result in before.items() if key not in after}
        if not changed and not gone:
            return b""
        state = ClientState.of(program.selector, client)
        return flageval.changes(
            flageval.STREAM, program.selector, changed, gone, state, with_reasons=reasons
        )
