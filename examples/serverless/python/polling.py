"""A Lambda function that uses the SDK as normal: it polls its flags, from the relay."""

import json
import os
import signal
from types import FrameType

from ldclient import Context, LDClient
from ldclient.config import Config

RELAY = os.environ["RELAY_URL"]
FLAG = os.environ.get("FLAG_KEY", "greeting")
START_LIMIT = 2.0
"""Seconds that a cold start waits for flags; without them, the handler answers with its default."""

# Outside the handler: once for each cold start, and every invocation after it finds the flags in
# memory, where they are renewed each 30 seconds while the function runs. Diagnostics would be one
# more request of each cold start.
client = LDClient(
    Config(
        os.environ["LAUNCHDARKLY_SDK_KEY"],
        base_uri=RELAY,
        stream=False,
        events_uri=RELAY,
        diagnostic_opt_out=True,
    ),
    start_wait=START_LIMIT,
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
