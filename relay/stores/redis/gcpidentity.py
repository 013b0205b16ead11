"""Memorystore with IAM: the password is an access token of Google Cloud."""

from __future__ import annotations

import asyncio
from functools import partial

import google.auth
import urllib3
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.urllib3 import Request
from redis.exceptions import RedisError

from relay.aio import in_thread
from relay.reasons import describe
from relay.stores.redis.identity import Identity

SCOPE = "https://www.googleapis.com/auth/cloud-platform"

TIMEOUT = 5.0
"""Seconds for a request to Google, or to the machine's metadata server."""


class GCPIdentity(Identity):
    """User of Memorystore: a service account, found as by all of Google's libraries.

    Args:
        username: name of the user; empty for the server's default user.
    """

    def __init__(self, username: str) -> None:
        self._username = username
        self._credentials: Credentials | None = None
        self._renewing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<GCPIdentity {self._username!r}>"

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the user and the access token; a new one if it is about to expire."""
        async with self._renewing:
            try:
                token = await in_thread(self._token, "google-auth")  # the library blocks
            except DefaultCredentialsError as e:
                text = "there are no Google credentials, neither in"
                text = f"{text} GOOGLE_APPLICATION_CREDENTIALS nor elsewhere"
                raise RedisError(text) from e
            except (GoogleAuthError, OSError, ValueError) as e:
                raise RedisError(f"Google gives no access token: {describe(e)}") from e
        return (self._username, token) if self._username else (token,)

    def note_refusal(self) -> None:
        """Look for other credentials next time: a file may have been replaced."""
        self._credentials = None

    def _token(self) -> str:
        credentials = self._credentials
        if credentials is None:
            credentials, _ = google.auth.default(scopes=[SCOPE])
            self._credentials = credentials
        if not credentials.valid:
            with urllib3.PoolManager(retries=False) as manager:
                request = Request(manager)  # type: ignore[no-untyped-call]
                credentials.refresh(partial(request, timeout=TIMEOUT))  # type: ignore[no-untyped-call]
        return str(credentials.token)
