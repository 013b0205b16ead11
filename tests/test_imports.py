import json
import subprocess
import sys

import pytest


def outcome(program: str, **variables: str):
    """Run a program in an interpreter of its own; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=variables,
    )
    return json.loads(done.stdout)


def test_importing_the_http_client_reads_no_authorities():
    """Its own contexts stay empty, and contexts made afterwards have the system's authorities."""
    program = """
import json, ssl, tempfile, trustme
with tempfile.NamedTemporaryFile() as file:
    trustme.CA().cert_pem.write_to_path(file.name)
    import os
    os.environ["SSL_CERT_FILE"] = file.name
    import relay.upstream
    from aiohttp import connector
    unused = (connector._SSL_CONTEXT_VERIFIED, connector._SSL_CONTEXT_UNVERIFIED)
    afterwards = ssl.create_default_context()
    print(json.dumps([len(each.get_ca_certs()) for each in (*unused, afterwards)]))
"""
    assert outcome(program, SSL_CERT_DIR="/nowhere") == [0, 0, 1]


def test_authorities_are_read_again_after_a_failed_import():
    """A library that cannot be imported leaves nothing behind."""
    program = """
import json, ssl
from relay.imports import system_authorities_skipped
method = ssl.SSLContext.set_default_verify_paths
try:
    with system_authorities_skipped():
        skipped = ssl.SSLContext.set_default_verify_paths is not method
        import relay.no_such_module
except ImportError:
    print(json.dumps([skipped, ssl.SSLContext.set_default_verify_paths is method]))
"""
    assert outcome(program) == [True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_collection_pauses_for_imports(fails):
    """It is off meanwhile and on afterwards, also after an error, and passes over the modules."""
    program = f"""
import gc, json
from relay.imports import garbage_collection_paused
try:
    with garbage_collection_paused():
        meanwhile = gc.isenabled()
        import decimal
        1 // {0 if fails else 1}
except ZeroDivisionError:
    pass
print(json.dumps([meanwhile, gc.isenabled(), gc.get_freeze_count() > 1000]))
"""
    assert outcome(program) == [False, True, True]


NEVER_AT_A_START = {"relay.sync", "relay.stores.mirror", "relay.stores.redis", "redis", "multipart"}


@pytest.mark.parametrize(
    ("variables", "absent"),
    [
        ({"LD_ENV_x": "sdk-x"}, NEVER_AT_A_START),
        ({"FLAGS_FILE": "config/flags.yaml"}, {*NEVER_AT_A_START, "aiohttp", "relay.upstream"}),
    ],
)
def test_a_start_imports_only_what_its_configuration_uses(variables, absent):
    """Without a database no driver and no mirror; with a file of flags no HTTP client either."""
    program = """
import json, os, sys
from relay.cli import main
from relay.config.load import load
from relay.server.options import ServerOptions
from relay.server.site import build_site
config = load("", True, False, os.environ)
build_site(config, ServerOptions.of(config).limits)
print(json.dumps(sorted(sys.modules)))
"""
    assert absent.isdisjoint(outcome(program, **variables))
