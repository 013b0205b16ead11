"""The demo flags are what the SDKs' own file data source reads, and do what their comments say."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.integrations import Files

FLAGS = Path(__file__).parent.parent / "config/flags.yaml"


@pytest.fixture(name="sdk")
def sdk_on_the_file() -> Iterator[LDClient]:
    """The Python SDK, reading the file by itself."""
    source = Files.new_data_source(paths=[str(FLAGS)])
    with LDClient(Config("sdk-x", update_processor_class=source, send_events=False)) as client:
        assert client.is_initialized()
        yield client


def test_simple_values_are_the_same_for_everybody(sdk: LDClient) -> None:
    """`flagValues` need no rules."""
    anybody = Context.create("anybody")
    assert sdk.variation("greeting", anybody, None) == "Hello from Relay"
    assert sdk.variation("checkout-limit", anybody, None) == 3
    assert sdk.variation("theme", anybody, None) == {"primary": "#405bff", "dark": False}


@pytest.mark.parametrize(
    ("context", "seen"),
    [
        (Context.create("anna"), True),
        (Context.builder("eve").set("email", "eve@example.com").build(), True),
        (Context.create("somebody"), False),
        (Context.builder("careful-user").set("email", "c@example.com").build(), False),
    ],
)
def test_staff_sees_the_new_checkout(sdk: LDClient, context: Context, seen: bool) -> None:
    """Targets stand above rules, and the segment decides for the others."""
    assert sdk.variation("new-checkout", context, None) is seen


def test_a_tenth_has_the_new_search(sdk: LDClient) -> None:
    """The rollout's weights are what the comment says."""
    seen = [sdk.variation("new-search", Context.create(f"user-{n}"), None) for n in range(2000)]
    assert 140 < sum(seen) < 260
