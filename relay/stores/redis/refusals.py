"""Errors of Redis for people: what the server says, and what to do about it."""

from __future__ import annotations

import os
import re

from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from relay.reasons import describe, shorten, tls_reason

_ERRNO = re.compile("Error ([0-9]+) connecting to ")

_IS_CLUSTER = "this is a Redis Cluster: set REDIS_CLUSTER=true"
_WRONG_USER = "check {0}_USERNAME and {0}_PASSWORD, or what the URL has in their place"

ADVICE = {
    "NOAUTH": "set {0}_PASSWORD, and {0}_USERNAME unless the user is called default",
    "WRONGPASS": _WRONG_USER,
    "ERR invalid password": _WRONG_USER,
    "ERR AUTH <password> called without any password": "the server has no password: configure none",
    "NOPERM": "allow this user the commands and keys that docs/daemon-mode.md lists",
    "DENIED": "it serves its own machine only: give it a password, or set protected-mode no if"
    " nobody else can reach it",
    "ERR max number of clients reached": "raise maxclients, or end clients that are not needed",
    "READONLY": "this is a replica, maybe since a failover: name its master, or use REDIS_SENTINELS"
    " or REDIS_CLUSTER",
    "MOVED": _IS_CLUSTER,
    "ASK": _IS_CLUSTER,
    "CROSSSLOT": _IS_CLUSTER,
    "ERR SELECT is not allowed in cluster mode": f"{_IS_CLUSTER}, and leave the number out",
    "ERR This instance has cluster support disabled": "this is no cluster: leave REDIS_CLUSTER out",
    "ERR DB index is out of range": "the server has fewer databases: choose a smaller number",
    "CLUSTERDOWN": "a part of the cluster has no master: it answers when each has one again",
    "MASTERDOWN": "this is a replica that has lost its master: it answers when they are connected",
    "TRYAGAIN": "keys are moving to another server of the cluster: it answers when all are there",
    "LOADING": "it reads its data from disk: it answers when it has them",
    "MISCONF": "it cannot save its data: its own log says why",
    "OOM": "raise maxmemory, or remove what is not needed",
}
"""Advice, by the beginning of the server's answer; `{0}` begins the variables of a user."""


def reason_of(error: Exception, variables: str = "REDIS") -> str:
    """Return the reason of an error, in the server's words if it has sent any, with advice.

    Args:
        error: of the library or the system.
        variables: beginning of the names of the variables with user and password.
    """
    tls = tls_reason(error)
    match error:
        case _ if tls:
            reason = f"TLS failed: {tls}"
        case AuthenticationError():
            reason = f"the server refuses user or password: {_with_advice(error, variables)}"
        case ResponseError():
            reason = f"the server answers: {_with_advice(error, variables)}"
        case RedisTimeout() | TimeoutError():
            reason = "no answer in time"
        case RedisConnectionError(__context__=OSError() as cause):
            reason = describe(cause)
        case RedisConnectionError() if number := _ERRNO.match(str(error)):
            reason = os.strerror(int(number[1]))  # the library may lose the cause
        case RedisConnectionError():
            reason = _with_advice(
                error, variables
            )  # "loading" and "too many clients" are of this class, too
        case _:
            reason = describe(error)
    return reason


def _with_advice(error: RedisError, variables: str) -> str:
    text = _text(error)
    for beginning, advice in ADVICE.items():
        if text.startswith(beginning):
            return f"{text.rstrip('.')} ({advice.format(variables)})"
    return text


def _text(error: RedisError) -> str:
    """Return the text of an error without the arguments of the command.

    A server that does not know AUTH repeats the password in its error.
    """
    text, _, _ = str(error).partition(", with args beginning")
    code = getattr(error, "status_code", None)  # redis-py 8 removes it from the text
    return shorten(f"{code} {text}" if code and not text.startswith(code) else text)
