"""One decision about trust, on every interpreter."""

from __future__ import annotations

import re
import ssl

import pytest

from relay.errors import ConfigError
from relay.tls import client_context
from tests.support.authorities import UNTIDY, Authority
from tests.support.process import ROOT


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """Connect both in memory; raises what the client sees."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(back, there, server_hostname=host),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(5):
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
    assert not sides


@pytest.mark.parametrize("form", UNTIDY.values(), ids=UNTIDY.keys())
def test_the_form_of_an_authority_is_not_judged(tmp_path, form):
    """Authorities of inspection proxies and plain `openssl req -x509` are trusted, if named."""
    authority = Authority(tmp_path, **form)
    shake_hands(client_context([authority.file]), authority.server("a.example"), "a.example")


@pytest.mark.parametrize(
    ("hosts", "days", "named", "reason"),
    [
        (["a.example"], 1, False, "unable to get local issuer certificate"),
        (["b.example"], 1, True, "Hostname mismatch, certificate is not valid for 'a.example'."),
        (["a.example"], -1, True, "certificate has expired"),
    ],
)
@pytest.mark.parametrize("form", [{}, *UNTIDY.values()], ids=["tidy", *UNTIDY.keys()])
def test_chain_host_name_and_dates_are(tmp_path, form, *, hosts, days, named, reason):
    """An unknown authority, another host and an old certificate are refused."""
    authority = Authority(tmp_path, **form)
    context = client_context([authority.file] if named else [])
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake_hands(context, authority.server(*hosts, days=days), "a.example")
    assert caught.value.verify_message == reason


def test_the_authorities_of_the_system_are_trusted_too(tmp_path, monkeypatch):
    """They are where OpenSSL's variables say; a file of one's own is beside them, or alone."""
    system, own = Authority(tmp_path), Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(system.file))
    server = system.server("a.example")
    shake_hands(client_context(), server, "a.example")
    shake_hands(client_context([own.file]), server, "a.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client_context([own.file], trust_system=False), server, "a.example")


def test_files_that_cannot_be_used_are_all_named(tmp_path):
    """With the words of the system, or of OpenSSL."""
    text, absent = tmp_path / "text.pem", tmp_path / "absent.pem"
    text.write_text("hello")
    with pytest.raises(ConfigError) as caught:
        client_context([text, absent])
    assert caught.value.problems == (
        f"CA file {text} cannot be used: no certificate or crl found",
        f"CA file {absent} cannot be used: No such file or directory",
    )


def test_nothing_else_makes_contexts_that_verify():
    """A second place would decide otherwise; `health.py` verifies nothing, and sends nothing."""
    making = re.compile("create_default_context|PROTOCOL_TLS_CLIENT|_create_unverified")
    places = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "relay").rglob("*.py")
        if making.search(path.read_text())
    }
    assert places == {"relay/tls.py", "relay/cli/health.py"}
