"""One older Python SDK, driven by a test: JSON lines in, an answer for each (tests/support/sdk.py).

`PYTHONPATH` begins with the folder of its package.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import ldclient

from tests.support.sdk import SDK, Setup, make


async def main() -> None:
    """Answer until the input ends."""
    assert Path(ldclient.__file__).is_relative_to(Path(__file__).parent), ldclient.__file__
    sdk: SDK | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        what: dict[str, Any] = json.loads(line)
        operation = what.pop("operation")
        result = None
        try:
            if operation == "init":
                sdk = await make(what.pop("line"), Setup(**what)).__aenter__()
            elif operation == "close":
                assert sdk is not None
                await sdk.__aexit__(None, None, None)
            else:
                result = await getattr(sdk, operation)(**what)
            answer = {"result": result}
        except Exception as e:  # noqa: BLE001 - the test is told
            answer = {"error": str(e) or repr(e)}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer


asyncio.run(main())
