"""A relay in full runs on the loop that it runs on in production, and is asked at both doors."""

import ssl

import pytest
import trustme
import uvloop

from relay.server.options import Certificate
from tests.support.redis import RedisServer
from tests.support.rediscluster import cluster, sentinels, shared_cluster, shared_sentinels
from tests.support.s3 import S3Server
from tests.support.sdk import EDGE_PACKAGES, install_older_python, install_packages

__all__ = ["cluster", "sentinels", "shared_cluster", "shared_sentinels"]


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def packages():
    """Packages that the Node and browser SDKs need, installed on first use."""
    install_packages()


@pytest.fixture(scope="session")
def older_python():
    """The Python SDK as it was before, installed on first use."""
    if why := install_older_python():
        pytest.skip(why)


@pytest.fixture(scope="session")
def edge_packages():
    """Packages that the edge SDKs need, installed on first use."""
    install_packages(EDGE_PACKAGES)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A server that speaks S3's protocol."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def redis(tmp_path):
    """A database of the test's own."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A certificate for the server, and a context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    folder = tmp_path_factory.mktemp("tls")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return Certificate(folder / "cert.pem", folder / "key.pem"), trust


@pytest.fixture(params=["front", "front-tls", "app", "app-tls"])
def door(request, authority):
    """Keyword arguments that choose the door."""
    tls = {"certificate": authority[0], "trust": authority[1]} if "tls" in request.param else {}
    return {"front": request.param.startswith("front"), **tls}
