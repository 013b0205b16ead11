"""Users whose passwords are tokens of a cloud that last for minutes (AWS, Google Cloud)."""

# ruff: noqa: PLC0415 - only the library of the configured cloud is needed

from __future__ import annotations

from collections.abc import Mapping

from redis.credentials import CredentialProvider

from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError

REAUTHENTICATION = 10 * 3600.0
"""Seconds after which a connection shows a new token; clouds end it twelve hours after the last."""


class Identity(CredentialProvider):
    """Gives the token of the moment to each connection that authenticates."""

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return user and token, or a token alone; it is valid for the next minutes.

        Raises:
            RedisError: there is none, for a reason that the text gives.
        """
        raise NotImplementedError

    def note_refusal(self) -> None:
        """Note that the server has refused the last token: there may be other credentials."""


def make_identity(options: RedisOptions, environ: Mapping[str, str]) -> Identity | None:
    """Return the configured identity; None if user and password are fixed.

    Args:
        options: `identity` and what belongs to it, already validated.
        environ: environment variables.

    Raises:
        ConfigError: a library is missing, or the profile that `AWS_PROFILE` names.
    """
    try:
        if options.identity == "aws":
            from relay.stores.redis.awsidentity import AWSIdentity

            return AWSIdentity(options, environ)
        if options.identity == "gcp":
            from relay.stores.redis.gcpidentity import GCPIdentity

            return GCPIdentity(options.username)
    except ImportError as e:
        cloud = {"aws": "AWS", "gcp": "Google Cloud"}[options.identity]
        text = f"[Redis] identity: {options.identity} needs the libraries for {cloud}:"
        raise ConfigError([f"{text} pip install 'relay[{options.identity}]'"]) from e
    return None
