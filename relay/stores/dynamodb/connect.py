"""The connection to DynamoDB, and what its errors mean."""

from __future__ import annotations

from collections.abc import Mapping

from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError, NoRegionError

from relay.errors import StoreUnavailable
from relay.stores.aws.connection import AWSConnection, error_code, reason_of

READ_TIMEOUT = 10.0
"""Seconds of silence of the service."""


def connect(url: str, environ: Mapping[str, str]) -> AWSConnection:
    """Return the connection that all stores share. Call this before the event loop is busy.

    Args:
        url: URL of the service; empty for that of AWS's variables, or of the region.
        environ: environment variables.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """
    # Parameters are ours, and right. To validate them would take as long as all else.
    config = AioConfig(read_timeout=READ_TIMEOUT, parameter_validation=False)
    return AWSConnection("dynamodb", environ, config, url)


def unavailable(error: Exception, table: str) -> StoreUnavailable:
    """Return the error for a failed request, with what to do about it where that is known."""
    if isinstance(error, NoRegionError):
        return StoreUnavailable("there is no region; AWS_REGION or DYNAMODB_URL names it")
    if isinstance(error, ClientError) and error_code(error) == "ResourceNotFoundException":
        return StoreUnavailable(
            f'there is no table "{table}" in this region and account; Relay never creates it, and'
            ' it needs the partition key "namespace" and the sort key "key", both strings'
        )
    return StoreUnavailable(reason_of(error))
