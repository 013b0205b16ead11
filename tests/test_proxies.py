"""Proxies as Go reads them: every expectation here was given by Go's `httpproxy` itself.

Left out are two in which we are kinder: a host in capitals is `localhost`, too, and with `*` in
`NO_PROXY` nothing else is looked at.
"""

from __future__ import annotations

import base64

import pytest
from yarl import URL

from relay.errors import ConfigError, UpstreamUnavailable
from relay.proxies import environment_proxies, fixed_proxy

P, S = "http://p:1", "http://s:2"
PROXIES = {"HTTP_PROXY": P, "HTTPS_PROXY": S}


def chosen(environ: dict[str, str], url: str) -> str:
    proxy = environment_proxies(environ)(URL(url))
    return "" if proxy is None else str(proxy.url)


@pytest.mark.parametrize(
    ("environ", "url", "expected"),
    [
        ({"HTTP_PROXY": P}, "http://ld.example/all", P),
        ({"HTTP_PROXY": P}, "https://ld.example/all", ""),
        ({"HTTPS_PROXY": P}, "http://ld.example/all", ""),
        ({"HTTPS_PROXY": P}, "https://ld.example/all", P),
        ({"http_proxy": P}, "http://ld.example/", P),
        ({"https_proxy": P}, "https://ld.example/", P),
        ({"HTTP_PROXY": "http://upper:1", "http_proxy": "http://lower:1"}, "http://ld.example/", "http://upper:1"),
        ({"HTTP_PROXY": "", "http_proxy": "http://lower:1"}, "http://ld.example/", "http://lower:1"),
        ({"HTTPS_PROXY": "http://upper:1", "https_proxy": "http://lower:1"}, "https://ld.example/", "http://upper:1"),
        ({"ALL_PROXY": P, "all_proxy": P}, "http://ld.example/", ""),
        ({"ALL_PROXY": P, "all_proxy": P}, "https://ld.example/", ""),
        ({"HTTP_PROXY": P, "NO_PROXY": "ld.example", "no_proxy": "other.example"}, "http://ld.example/", ""),
        ({"HTTP_PROXY": P, "NO_PROXY": "other.example", "no_proxy": "ld.example"}, "http://ld.example/", P),
        ({"HTTP_PROXY": P, "NO_PROXY": "", "no_proxy": "ld.example"}, "http://ld.example/", ""),
        ({"HTTP_PROXY": "proxy.example:3128"}, "http://ld.example/", "http://proxy.example:3128"),
        ({"HTTP_PROXY": "proxy.example"}, "http://ld.example/", "http://proxy.example"),
        ({"HTTP_PROXY": "localhost:3128"}, "http://ld.example/", "http://localhost:3128"),
        ({"HTTP_PROXY": "10.0.0.1:3128"}, "http://ld.example/", "http://10.0.0.1:3128"),
        ({"HTTP_PROXY": "https://proxy.example"}, "http://ld.example/", "https://proxy.example"),
        ({"HTTP_PROXY": "HTTP://Proxy.Example"}, "http://ld.example/", "http://proxy.example"),
        ({"HTTP_PROXY": P}, "http://localhost/", ""),
        ({"HTTP_PROXY": P}, "http://localhost:8030/", ""),
        ({"HTTP_PROXY": P}, "http://127.0.0.1/", ""),
        ({"HTTP_PROXY": P}, "http://127.9.9.9:1/", ""),
        ({"HTTP_PROXY": P}, "http://[::1]/", ""),
        ({"HTTP_PROXY": P}, "http://[::1]:8030/", ""),
        ({"HTTP_PROXY": P}, "http://[::ffff:127.0.0.1]/", ""),
        ({"HTTP_PROXY": P}, "http://localhost.example/", P),
        ({"HTTP_PROXY": P}, "http://localhost./", P),
        ({"HTTP_PROXY": P}, "http://128.0.0.1/", P),
        ({"HTTP_PROXY": P}, "http://0.0.0.0/", P),
        ({"HTTP_PROXY": P}, "http://[::]/", P),
        ({"HTTPS_PROXY": P}, "https://localhost/", ""),
    ],
)  # fmt: skip
def test_variables_name_proxies_for_schemes(environ, url, expected):
    """Capitals first; without a scheme it is HTTP; this machine is asked directly."""
    assert chosen(environ, url) == expected


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("ld.example", "http://ld.example/", True),
        ("ld.example", "https://ld.example/", True),
        ("ld.example", "http://app.ld.example/", True),
        ("ld.example", "http://a.b.ld.example/", True),
        ("ld.example", "http://notld.example/", False),
        ("LD.Example", "http://ld.example/", True),
        ("ld.example", "http://LD.EXAMPLE/", True),
        (".ld.example", "http://ld.example/", False),
        (".ld.example", "http://app.ld.example/", True),
        ("*.ld.example", "http://ld.example/", False),
        ("*.ld.example", "http://app.ld.example/", True),
        ("*ld.example", "http://app.ld.example/", False),
        ("app.*", "http://app.example/", False),
        ("*", "http://ld.example/", True),
        ("*", "https://10.0.0.1/", True),
        ("a, *", "http://ld.example/", True),
        ("*:80", "http://ld.example/", False),
        ("ld.example:80", "http://ld.example/", True),
        ("ld.example:80", "http://ld.example:8080/", False),
        ("ld.example:443", "https://ld.example/", True),
        ("ld.example:80", "https://ld.example/", False),
        ("ld.example:8080", "http://app.ld.example:8080/", True),
        (".ld.example:8080", "http://ld.example:8080/", False),
        ("*.ld.example:8080", "http://app.ld.example:8080/", True),
        ("ld.example:", "http://ld.example:8080/", True),
        (":80", "http://ld.example/", False),
        ("a,ld.example,b", "http://ld.example/", True),
        (" a , ld.example ", "http://ld.example/", True),
        ("a ld.example", "http://ld.example/", False),
        ("a;ld.example", "http://ld.example/", False),
        (",,ld.example,", "http://ld.example/", True),
        ("", "http://ld.example/", False),
        ("10.0.0.1", "http://10.0.0.1/", True),
        ("10.0.0.1", "http://10.0.0.11/", False),
        ("10.0.0.1:80", "http://10.0.0.1/", True),
        ("10.0.0.1:81", "http://10.0.0.1/", False),
        ("10.0.0.1", "https://10.0.0.1:8443/", True),
        ("10.0.0", "http://10.0.0.1/", False),
        ("10.", "http://10.0.0.1/", False),
        ("10.0.0.0/8", "http://10.1.2.3/", True),
        ("10.0.0.0/8", "http://11.1.2.3/", False),
        ("10.1.2.3/8", "http://10.9.9.9/", True),
        ("10.0.0.0/8", "http://ten.example/", False),
        ("10.0.0.0/8:80", "http://10.0.0.1/", False),
        ("10.0.0.0/33", "http://10.0.0.1/", False),
        ("10.0.0.0/255.0.0.0", "http://10.0.0.1/", False),
        ("0.0.0.0/0", "http://10.0.0.1/", True),
        ("0.0.0.0/0", "http://[fd00::1]/", False),
        ("10.0.0.0/", "http://10.0.0.0/", False),
        ("fd00::/8", "http://[fd00::1]/", True),
        ("fd00::/8", "http://[fe00::1]/", False),
        ("fd00::1", "http://[fd00::1]:8080/", True),
        ("fd00:0:0::1", "http://[fd00::1]/", True),
        ("[fd00::1]:80", "http://[fd00::1]/", True),
        ("[fd00::1]:81", "http://[fd00::1]/", False),
        ("[fd00::1]", "http://[fd00::1]/", False),
        ("::/0", "http://[fd00::1]/", True),
        ("::/0", "http://10.0.0.1/", False),
        ("10.0.0.1", "http://[::ffff:10.0.0.1]/", True),
        ("::ffff:10.0.0.1", "http://10.0.0.1/", True),
        ("10.0.0.0/8", "http://[::ffff:10.0.0.1]/", True),
        ("::ffff:10.0.0.0/104", "http://10.0.0.1/", True),
        ("bücher.example", "http://bücher.example/", True),
        ("bücher.example", "http://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "http://bücher.example/", True),
        (".bücher.example", "http://a.bücher.example/", True),
        ("bücher.example", "http://a.bücher.example/", True),
        ("BÜCHER.example", "http://bücher.example/", True),
        ("ld.example.", "http://ld.example/", False),
        ("ld.example", "http://ld.example./", False),
        ("example", "http://ld.example/", True),
        ("ld.example/x", "http://ld.example/", False),
        ("http://ld.example", "http://ld.example/", False),
        ("010.0.0.1", "http://10.0.0.1/", False),
        ("10.0.0.0/08", "http://10.0.0.1/", True),
        (".", "http://ld.example/", False),
        ("*.", "http://ld.example/", False),
    ],
)  # fmt: skip
def test_no_proxy_lists_what_is_asked_directly(no_proxy, url, direct):
    """Names with what is below them, addresses, networks, ports; what means nothing is ignored."""
    through = S if url.startswith("https") else P
    assert chosen({**PROXIES, "NO_PROXY": no_proxy}, url) == ("" if direct else through)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_a_cgi_program_does_not_trust_http_proxy(name):
    """A client could set it by a header; requests over HTTPS do not care."""
    choose = environment_proxies({name: P, "HTTPS_PROXY": S, "REQUEST_METHOD": "GET"})
    for url in ("http://ld.example/", "http://localhost/"):
        with pytest.raises(UpstreamUnavailable, match="HTTP_PROXY cannot be trusted"):
            choose(URL(url))
    assert str(choose(URL("https://ld.example/")).url) == S
    assert chosen({name: P, "REQUEST_METHOD": ""}, "http://ld.example/") == P


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    "value",
    [
        "socks5://me:geheim@proxy:1080",
        "SOCKS5h://me:geheim@proxy:1080",
        "socks4://geheim@proxy",
        "ftp://me:geheim@proxy",
        "://me:geheim@proxy",
        "//me:geheim@proxy",
        "http://",
        "http://me:geheim@",
        "http://me:geheim@proxy:x",
        "http://me:geheim@proxy:99999",
        "http://me:geheim@proxy:0",
        "me:geheim@pro xy",
        "http://me:geh/eim@proxy",
        "http://[::1",
        "http://pro\nxy:80",
        "http://pro\u00a0xy:80",
        "http://pro\nxy:geheim@:80",
    ],
)
def test_a_proxy_that_cannot_be_spoken_to_is_refused(name, value):
    """By the name of its variable, and without its password."""
    with pytest.raises(ConfigError, match=f"^{name}: the proxy's URL must be http") as caught:
        environment_proxies({name: value})
    assert "geh" not in str(caught.value)


def test_all_that_cannot_be_used_is_named():
    """At once; and nothing if `NO_PROXY` excepts everything."""
    environ = {"http_proxy": "socks5://a", "HTTPS_PROXY": "socks5://b"}
    with pytest.raises(ConfigError) as caught:
        environment_proxies(environ)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "http_proxy",
        "HTTPS_PROXY",
    ]
    assert chosen({**environ, "NO_PROXY": "a, *"}, "http://ld.example/") == ""


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [
        ("me:p%40ss", b"me:p@ss"),
        ("m%C3%BC:%E2%82%AC", "m\u00fc:\u20ac".encode()),
        ("m\u00fc:\u20ac", "m\u00fc:\u20ac".encode()),
        ("me:%E9", b"me:\xe9"),
        ("me", b"me:"),
        (":geheim", b":geheim"),
        ("me:a:b+c", b"me:a:b+c"),
        ("corp%5Cme:geheim", b"corp\\me:geheim"),
    ],
)
@pytest.mark.parametrize(
    "proxied", [fixed_proxy, lambda url: environment_proxies({"HTTP_PROXY": url})]
)
def test_user_and_password_are_any_bytes(proxied, userinfo, credentials):
    """Percent-encoded; what is written plainly is UTF-8. They are not in the URL any more."""
    proxy = proxied(f"http://{userinfo}@proxy:3128")(URL("http://ld.example/"))
    assert proxy.authorization == f"Basic {base64.b64encode(credentials).decode()}"
    assert str(proxy.url) == "http://proxy:3128"
    assert "Basic" not in repr(proxy)


def test_a_configured_proxy_is_for_everything():
    """Also for this machine."""
    assert str(fixed_proxy(P)(URL("https://localhost/")).url) == P
    with pytest.raises(ConfigError, match=r"^the proxy's URL must be") as caught:
        fixed_proxy("socks5://me:geheim@x")
    assert "geheim" not in str(caught.value)
