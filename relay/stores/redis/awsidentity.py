"""ElastiCache and MemoryDB with IAM: the password is a presigned URL, which AWS calls a token."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError
from redis.exceptions import RedisError

from relay.config.schema import Redis as RedisOptions
from relay.stores.aws.connection import reason_of
from relay.stores.aws.session import AWSSession
from relay.stores.redis.identity import Identity

VALIDITY = 900
"""Seconds for which a token is valid, the longest that AWS allows."""

_SERVERLESS = "-serverless"


class AWSIdentity(Identity):
    """User of ElastiCache or MemoryDB whose authentication mode is IAM.

    Args:
        options: user, name of the cache, service, and region if not that of AWS's variables.
        environ: environment variables.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """

    def __init__(self, options: RedisOptions, environ: Mapping[str, str]) -> None:
        self._user = options.username
        self._cache = options.iam_cache
        self._service = options.iam_service
        self._session = AWSSession("", environ)
        self._region = options.iam_region or self._session.region

    def __repr__(self) -> str:
        return f"<AWSIdentity {self._user!r} of {self._service} {self._cache!r}>"

    async def get_credentials_async(self) -> tuple[str, str]:
        """Return the user and a new token: to sign one takes less than a millisecond."""
        if not self._region:
            raise RedisError("there is no region; AWS_REGION or REDIS_IAM_REGION names it")
        try:
            credentials = await self._session.credentials()
        except (BotoCoreError, OSError, TimeoutError) as e:
            raise RedisError(reason_of(e)) from e
        token = make_token(credentials, self._service, self._region, self._cache, self._user)
        return self._user, token

    def note_refusal(self) -> None:
        """Look for other credentials next time: those of files and variables may have expired."""
        self._session.renew(self._session.version)


def make_token(
    credentials: ReadOnlyCredentials, service: str, region: str, cache: str, user: str
) -> str:
    """Return a token that is valid from now on.

    Args:
        credentials: of AWS, with the right `elasticache:Connect` or `memorydb:Connect`.
        service: `elasticache`, `elasticache-serverless` or `memorydb`.
        region: of the cache.
        cache: name of the cache, the replication group or the cluster.
        user: ID of the user, which is its name as well.
    """
    query = {"Action": "connect", "User": user}
    if service.endswith(_SERVERLESS):
        query["ResourceType"] = "ServerlessCache"
    # AWS keeps names in lower case, and compares the host that is signed with them.
    request = AWSRequest("GET", f"https://{cache.lower()}/?{urlencode(query)}")
    signer = SigV4QueryAuth(credentials, service.removesuffix(_SERVERLESS), region, VALIDITY)
    signer.add_auth(request)
    token: str = request.prepare().url
    return token.removeprefix("https://")
