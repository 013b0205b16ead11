import pytest

from relay.model.event import EventsEndpoint


@pytest.mark.parametrize(
    ("endpoint", "path", "key"),
    [
        (EventsEndpoint.BULK, "/bulk", "server"),
        (EventsEndpoint.MOBILE, "/mobile", "mobile"),
        (EventsEndpoint.CLIENT_SIDE, "/events/bulk/env-1", "none"),
        (EventsEndpoint.BULK_DIAGNOSTIC, "/diagnostic", "server"),
        (EventsEndpoint.MOBILE_DIAGNOSTIC, "/mobile/events/diagnostic", "mobile"),
        (EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC, "/events/diagnostic/env-1", "none"),
    ],
)
def test_an_endpoint_has_a_path_and_a_kind_of_key(endpoint, path, key):
    """Client-side endpoints name the environment in the path, and need no key."""
    assert endpoint.path("env-1") == path
    assert (endpoint.mobile, endpoint.client_side) == (key == "mobile", key == "none")
    assert endpoint.diagnostic is ("diagnostic" in path)
