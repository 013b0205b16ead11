"""Sessions with AWS's services, for all stores that are there."""

from __future__ import annotations

from aiobotocore.session import AioSession


def load_descriptions(session: AioSession, service: str) -> None:
    """Load megabytes of descriptions, which the session then knows: at once the second time.

    It blocks. Otherwise the first request would, on the event loop.

    Args:
        session: that will make the client.
        service: name of the service, such as `s3`.
    """
    loader = session.get_component("data_loader")
    for kind in ("service-2", "endpoint-rule-set-1", "paginators-1", "waiters-2"):
        loader.load_service_model(service, kind)
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(name)
