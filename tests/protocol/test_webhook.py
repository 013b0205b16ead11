"""Webhook bodies and their signatures."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.credential import SDKKey, Secret
from relay.model.environment import EnvironmentSpec
from relay.protocol import webhook
from relay.protocol.webhook import MAX_RESOURCES, ChangedResource, ChangeNotice

SECRETS = (Secret("old-secret"), Secret("new-secret"))


def spec(name: str, project: str = "", environment: str = "") -> EnvironmentSpec:
    return EnvironmentSpec(
        name, SDKKey(f"sdk-{name}"), project_key=project, environment_key=environment
    )


def entry(*resources: str, **members: object) -> bytes:
    accesses = [{"action": "updateOn", "resource": resource} for resource in resources]
    return json.dumps({"_id": "1", "kind": "flag", "accesses": accesses, **members}).encode()


def current(version: object, environment: str = "production", key: str = "lamp") -> dict:
    return {"key": key, "environments": {environment: {"on": True, "version": version}}}


def test_the_signature_is_bare_hexadecimal_hmac_sha256():
    """The digest is that of the second test case of RFC 4231."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert webhook.sign(b"what do ya want for nothing?", Secret("Jefe")) == expected


@pytest.mark.parametrize("secret", SECRETS)
def test_any_of_the_secrets_may_have_signed(secret):
    """So that a secret can be rotated without an interruption."""
    assert webhook.is_signed(b"body", webhook.sign(b"body", secret), SECRETS)


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "0" * 64,
        webhook.sign(b"body", SECRETS[0]).upper(),
        "sha256=" + webhook.sign(b"body", SECRETS[0]),
        webhook.sign(b"body", SECRETS[0])[:-1],
        webhook.sign(b"other", SECRETS[0]),
        webhook.sign(b"body", Secret("another")),
        "é" * 64,
    ],
)
def test_other_signatures_are_refused(signature):
    """Whatever is wrong with the signature."""
    assert not webhook.is_signed(b"body", signature, SECRETS)


def test_without_a_secret_nothing_is_signed():
    """Not even a body signed with an empty secret."""
    assert not webhook.is_signed(b"body", webhook.sign(b"body", Secret("")), ())


@pytest.mark.parametrize(
    ("body", "resources"),
    [
        (
            entry("proj/shop:env/production:flag/lamp"),
            [ChangedResource("shop", "production", "lamp")],
        ),
        (
            entry("proj/shop;a,b:env/production;c:flag/lamp;d,e"),
            [ChangedResource("shop", "production", "lamp")],
        ),
        (
            entry("proj/shop:env/production:flag/lamp", currentVersion=current(7)),
            [ChangedResource("shop", "production", "lamp", 7)],
        ),
        (
            entry("proj/shop:env/production:flag/lamp", currentVersion=current(7, "test")),
            [ChangedResource("shop", "production", "lamp")],
        ),
        (
            entry("proj/shop:env/production:flag/lamp", currentVersion=current(7, key="other")),
            [ChangedResource("shop", "production", "lamp")],
        ),
        *(
            (
                entry("proj/shop:env/production:flag/lamp", currentVersion=current(version)),
                [ChangedResource("shop", "production", "lamp")],
            )
            for version in (True, "7", 7.5, -1, 2**60, None)
        ),
        (entry("proj/shop:env/production:segment/crowd"), [ChangedResource("shop", "production")]),
        (entry("proj/shop:env/*:flag/lamp"), [ChangedResource("shop", "*", "lamp")]),
        (entry("proj/shop:env/production:flag/*"), [ChangedResource("shop", "production")]),
        (entry("proj/shop"), [ChangedResource("shop", "*")]),
        (
            entry("proj/shop:env/a:flag/x", target={"resources": ["proj/shop:env/a:flag/x"]}),
            [ChangedResource("shop", "a", "x")],
        ),
        (
            entry(target={"resources": ["proj/shop:env/a:flag/x"]}),
            [ChangedResource("shop", "a", "x")],
        ),
        (entry("member/*:token/1"), []),
        (entry("proj/shop:env/a:flag/x", "webhook/1"), []),
        (entry(*(f"proj/shop:env/a:flag/{i}" for i in range(MAX_RESOURCES + 1))), []),
        (b"{}", []),
        (b'{"_id":"1","accesses":null,"target":null,"unknown":[1]}', []),
    ],
)
def test_resources_are_parsed(body, resources):
    """An unclear resource results in none, which means that anything may have changed."""
    assert list(webhook.read(body).resources) == resources


@pytest.mark.parametrize(
    "body",
    [b"", b"no json", b"[]", b'"text"', b"\xff", b'{"_id":1}', b'{"accesses":{}}', entry() + b"}",
     b'{"_id":"' + b"x" * 1000 + b'"}', b'{"currentVersion":' + b"[" * 100_000],
)  # fmt: skip
def test_other_bodies_are_refused(body):
    """With a reason, and with no other exception."""
    with pytest.raises(InvalidData):
        webhook.read(body)


@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["_id", "accesses", "target", "resource", "currentVersion"]), c)).map(lambda v: json.dumps(v).encode()))  # fmt: skip
def test_any_body_is_read_or_refused(body):
    """Hostile bodies cannot cause another exception."""
    with contextlib.suppress(InvalidData):
        assert isinstance(webhook.read(body), ChangeNotice)


@pytest.mark.parametrize(
    ("resources", "names"),
    [
        (["proj/shop:env/production:flag/lamp"], ["production"]),
        (["proj/shop:env/test:flag/lamp"], ["test"]),
        (["proj/shop:env/*:flag/lamp"], ["production", "test"]),
        (["proj/sh*:env/prod*:flag/lamp"], ["production"]),
        (["proj/shop"], ["production", "test"]),
        (["proj/*:env/production:flag/lamp"], ["production", "other"]),
        (["proj/unknown:env/production:flag/lamp"], ["production", "test", "other"]),
        (["member/1"], ["production", "test", "other"]),
        ([], ["production", "test", "other"]),
    ],
)
def test_resources_concern_environments(resources, names):
    """By both keys; what belongs to none concerns all."""
    specs = [
        spec("production", "shop", "production"),
        spec("test", "shop", "test"),
        spec("other", "bank", "production"),
    ]
    assert list(webhook.read(entry(*resources)).affected(specs)) == names


def test_an_environment_without_keys_always_matches():
    """Unknown keys exclude nothing."""
    specs = [spec("a", "shop", "production"), spec("b"), spec("c", "shop"), spec("d", "bank")]
    environments = webhook.read(entry("proj/shop:env/production:flag/lamp")).affected(specs)
    assert list(environments) == ["a", "b", "c"]


def test_a_filter_may_hold_back_a_flag_so_its_version_is_not_awaited():
    """Otherwise streams of filtered environments would be replaced after each change."""
    body = json.dumps(
        {
            "kind": "flag",
            "accesses": [{"resource": "proj/shop:env/production:flag/lamp"}],
            "currentVersion": {"key": "lamp", "environments": {"production": {"version": 7}}},
        }
    ).encode()
    whole = spec("production", "shop", "production")
    specs = [whole, replace(whole, name="production/north", payload_filter="north")]
    affected = webhook.read(body).affected(specs)
    assert {n: [r.version for r in resources] for n, resources in affected.items()} == {
        "production": [7],
        "production/north": [None],
    }
