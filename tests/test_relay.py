"""The relay as one object: its state at a glance."""

from relay.relay import Relay


def test_its_repr_tells_the_state():
    """The number of environments, and whether it shuts down; no keys."""
    relay = Relay([], init_timeout=5)
    assert repr(relay) == "<Relay: 0 environments>"
    relay.stopping = True
    assert repr(relay) == "<Relay: 0 environments, stopping>"
