"""Requests to one table of DynamoDB, sent again while the service throttles them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from relay import randomness
from relay.backoff import Backoff
from relay.errors import RelayError, StoreUnavailable
from relay.reasons import shorten
from relay.stores.aws.connection import Share, error_code
from relay.stores.dynamodb.connect import unavailable
from relay.stores.dynamodb.layout import Attributes, in_batches

THROTTLED = Backoff(first=0.05, longest=5.0)
"""Delays after requests that the service refuses because there are too many, or in part."""

MAX_THROTTLED = 10
"""Consecutive throttled requests of one write that have written nothing, before it fails: about
half a minute."""

PAGE = 100
"""Items of one answer: reading it takes three milliseconds, before other tasks can run."""

_THROTTLING = frozenset(
    {
        "InternalServerError",
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "ThrottlingException",
        "TransactionConflictException",
        "TransactionInProgressException",
    }
)
"""Error codes of requests that succeed when they are sent again later."""

_PASSING = frozenset({"ProvisionedThroughputExceeded", "ThrottlingError", "TransactionConflict"})
"""The same in the reasons for which a transaction is cancelled."""

_NAMES_TABLES = frozenset({"batch_get_item", "batch_write_item", "transact_write_items"})
"""Operations that name a table for each item."""


class ConditionFailed(RelayError):
    """The condition of a write does not hold, and nothing was written."""


class Table:
    """Requests to a table.

    Args:
        connection: share in the client.
        name: name of the table.
    """

    def __init__(self, connection: Share, name: str) -> None:
        self._connection = connection
        self.name = name
        self.server = connection.server

    def __repr__(self) -> str:
        return f"<Table {self.name!r} {self.server}>"

    async def call(self, operation: str, **arguments: Any) -> Attributes:
        """Send a request, again while it is throttled; return the answer.

        Raises:
            ConditionFailed: a condition does not hold.
            StoreUnavailable: the service does not answer, or refuses.
        """
        if operation not in _NAMES_TABLES:
            arguments["TableName"] = self.name
        failures = 0
        while True:
            try:
                async with self._connection.client() as client:
                    answer: Attributes = await getattr(client, operation)(**arguments)
                    return answer
            except ClientError as e:
                self._raise_unless_throttled(e)
                failures += 1
                await pause(failures, str(unavailable(e, self.name)))
            except (BotoCoreError, OSError, TimeoutError) as e:
                raise unavailable(e, self.name) from e

    async def get(self, key: Attributes) -> Attributes | None:
        """Return an item as it is now; None if there is none.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        answer = await self.call("get_item", Key=key, ConsistentRead=True)
        item: Attributes | None = answer.get("Item")
        return item

    async def query(self, namespace: str) -> list[Attributes]:
        """Return all items of a namespace as they are now, sorted by their keys.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        found: list[Attributes] = []
        start: Attributes = {}
        while True:
            answer = await self.call(
                "query",
                ConsistentRead=True,
                KeyConditionExpression="#namespace = :namespace",
                ExpressionAttributeNames={"#namespace": "namespace"},
                ExpressionAttributeValues={":namespace": {"S": namespace}},
                Limit=PAGE,
                **start,
            )
            found += answer.get("Items", ())
            if not (last := answer.get("LastEvaluatedKey")):
                return found
            start = {"ExclusiveStartKey": last}

    async def write(self, writes: Iterable[Attributes]) -> None:
        """Carry out writes in order, 25 in a request, each until it is done.

        Raises:
            StoreUnavailable: the service does not answer, or refuses; some may be done.
        """
        for batch in in_batches(writes):
            failures, remaining = 0, batch
            while remaining:
                answer = await self.call("batch_write_item", RequestItems={self.name: remaining})
                left = (answer.get("UnprocessedItems") or {}).get(self.name, [])
                failures = failures + 1 if len(left) == len(remaining) else 0
                remaining = left
                if remaining:
                    await pause(failures, "the service leaves writes undone")

    async def aclose(self) -> None:
        """End the share in the client."""
        await self._connection.aclose()

    def _raise_unless_throttled(self, error: ClientError) -> None:
        code = error_code(error)
        cancelled = [
            each for each in error.response.get("CancellationReasons", ()) if each["Code"] != "None"
        ]
        reasons = {each["Code"] for each in cancelled}
        if code == "ConditionalCheckFailedException" or "ConditionalCheckFailed" in reasons:
            raise ConditionFailed(code) from error
        if code in _THROTTLING or (reasons and reasons <= _PASSING):
            return
        for each in cancelled:
            text = shorten(f"{each['Code']}: {each.get('Message') or ''}").rstrip(": ")
            raise StoreUnavailable(f"the service cancels a transaction with {text}") from error
        raise unavailable(error, self.name) from error


async def pause(failures: int, reason: str) -> None:
    """Wait before a throttled request is sent again.

    Args:
        failures: consecutive requests that have done nothing.
        reason: reason to give if these are too many.

    Raises:
        StoreUnavailable: there were too many in vain.
    """
    if failures > MAX_THROTTLED:
        raise StoreUnavailable(reason)
    await asyncio.sleep(THROTTLED.delay(max(0, failures - 1), randomness.fraction()))
