"""A Lambda function in daemon mode: it reads flags from Redis, which the relay keeps current."""

import json
import os
import signal
from types import FrameType

from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.feature_store import CacheConfig
from ldclient.integrations import Redis

FLAG = os.environ.get("FLAG_KEY", "greeting")
CACHED = 5.0
"""Seconds until a flag that was read is read again: a change is seen that much later."""

DATABASE_LIMIT = 1.0
"""Seconds that Redis may take to connect and to answer; then the handler uses its default."""

# Outside the handler: once for each cold start. There is nothing to wait for: `use_ldd` opens no
# connection for flags. Events do not go through Redis but to the relay, or else to LaunchDarkly.
client = LDClient(
    Config(
        os.environ["LAUNCHDARKLY_SDK_KEY"],
        feature_store=Redis.new_feature_store(
            url=os.environ["REDIS_URL"],
            prefix=os.environ.get("REDIS_PREFIX", "launchdarkly"),
            caching=CacheConfig(expiration=CACHED),
            redis_opts={"socket_connect_timeout": DATABASE_LIMIT, "socket_timeout": DATABASE_LIMIT},
        ),
        use_ldd=True,
        events_uri=os.environ.get("RELAY_URL", "https://events.launchdarkly.com"),
        diagnostic_opt_out=True,
    )
)


def handler(event: dict, _context: object) -> dict:
    """Answer with the value that the flag has for the event's `user`."""
    user = Context.create(event.get("user", "somebody"))
    value = client.variation(FLAG, user, None)
    client.track("answered", user)
    client.flush()  # starts the delivery; `close` waits for what is not delivered until then
    return {"flag": FLAG, "value": value, "initialized": client.is_initialized()}


def end(_number: int, _frame: FrameType | None) -> None:
    """Deliver what is left, and end.

    Lambda sends SIGTERM between invocations only, so the SDK is at rest. Its runtime waits for the
    next one in a thread, which `sys.exit` would wait for.
    """
    client.close()
    os._exit(0)


signal.signal(signal.SIGTERM, end)

if __name__ == "__main__":
    with client:
        print(json.dumps(handler({"user": "anna"}, None)))
