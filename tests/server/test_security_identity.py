"""Who calls and what they may: tokens, JSON web tokens, certificates' names, and rules."""

import base64
import hmac
import json
import re
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from aqt_protos import open_inference_pb2 as pb
from aqt_server.errors import PermissionDenied, Unauthenticated
from aqt_server.security.authentication import (
    ANONYMOUS,
    AccessFileError,
    Authenticator,
    Principal,
)
from aqt_server.security.authorization import _NEEDS, Action, Guard
from aqt_server.settings import Access, Exempt, Tls
from server_process import eventually

TOKEN = "0123456789abcdef-a"
OTHER = "0123456789abcdef-b"
SECRET = b"a secret of thirty-two bytes ..."


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def oct_key(secret=SECRET, kid="shared"):
    return {"kty": "oct", "alg": "HS256", "kid": kid, "k": _base64(secret).decode()}


def _base64(content):
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def rsa_jwk(key, kid="rsa"):
    document = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**document, "kid": kid, "alg": "RS256"}


def claims(**changes):
    return {"sub": "team-a", "exp": time.time() + 1000, **changes}


def signed(key=SECRET, algorithm="HS256", kid="shared", **changes):
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


def who(access, token, tls=None):
    return Authenticator(access, tls or Tls()).identify(f"Bearer {token}", None).name


def refused(access, token, match):
    with pytest.raises(Unauthenticated, match=match) as raised:
        who(access, token)
    assert str(token) not in str(raised.value)


def test_a_static_token_has_a_name(tmp_path):
    access = Access(auth_tokens=file(tmp_path, "t", f'a = "{TOKEN}"\nb = "{OTHER}"'))
    assert who(access, TOKEN) == "a"
    assert who(access, OTHER) == "b"
    refused(access, TOKEN[:-1], "not known here")
    for header in ("Basic eDp5", "Bearer", "Bearer ", TOKEN):
        with pytest.raises(Unauthenticated, match="form `Bearer TOKEN`"):
            Authenticator(access, Tls()).identify(header, None)
    assert Authenticator(access, Tls()).identify(None, None) == ANONYMOUS


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('a = "short"', "'a' is no text of 16 characters"),
        ("a = 12345678901234567890", "'a' is no text"),
        (f'a = "{TOKEN}"\nb = "{TOKEN}"', "'b' has the token of 'a'"),
        (f'"" = "{TOKEN}"', "'' is no text"),
        (f"a = {TOKEN}", "no TOML file of lines"),
    ],
)
def test_a_wrong_file_of_tokens_is_refused_and_not_repeated(tmp_path, content, match):
    with pytest.raises(AccessFileError, match=f"--auth-tokens .*{match}") as raised:
        Authenticator(Access(auth_tokens=file(tmp_path, "t", content)), Tls())
    assert TOKEN not in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for setting in ("auth_tokens", "auth_jwks", "auth_policy"):
        flag = "--" + setting.replace("_", "-")
        with pytest.raises(AccessFileError, match=f"{flag} .* cannot be read: No such file"):
            Guard(Access(**{setting: tmp_path / "t"}), Tls())


def test_json_web_tokens_of_both_algorithms(tmp_path, rsa_key):
    keys = {"keys": [oct_key(), rsa_jwk(rsa_key)]}
    access = Access(auth_jwks=file(tmp_path, "jwks", keys))
    assert who(access, signed()) == "team-a"
    assert who(access, signed(rsa_key, "RS256", "rsa")) == "team-a"
    refused(access, signed(kid="unknown"), "key that is not known here")
    refused(access, signed(kid=None), "key that is not known here")  # of two, it says none
    refused(access, signed(key=SECRET[::-1]), "signature or form")
    refused(access, "a.b.c", "signature or form")
    refused(access, signed(exp=time.time() - 10), "expired")
    refused(access, signed(nbf=time.time() + 100), "not begun")
    refused(access, signed(sub=""), "subject is empty")
    refused(access, signed(aud="another"), "audience")
    without = {k: v for k, v in claims().items() if k != "exp"}
    refused(access, jwt.encode(without, SECRET, headers={"kid": "shared"}), "no claim 'exp'")


def test_a_token_does_not_choose_its_algorithm(tmp_path, rsa_key):
    """Neither none at all, nor the public key as a shared secret."""
    access = Access(auth_jwks=file(tmp_path, "jwks", {"keys": [rsa_jwk(rsa_key)]}))
    public = rsa_key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.PKCS1
    )
    none = jwt.encode(claims(), "", algorithm="none", headers={"kid": "rsa"})
    refused(access, none, "signature or form")
    parts = [{"alg": "HS256", "kid": "rsa", "typ": "JWT"}, claims()]
    text = b".".join(_base64(json.dumps(part).encode()) for part in parts)
    confused = text + b"." + _base64(hmac.digest(public, text, "sha256"))
    refused(access, confused.decode(), "signature or form")


def test_issuer_and_audience(tmp_path):
    jwks = file(tmp_path, "jwks", {"keys": [oct_key()]})
    access = Access(auth_jwks=jwks, auth_issuer="us", auth_audience="aqt")
    assert who(access, signed(kid=None, iss="us", aud=["aqt", "more"])) == "team-a"
    refused(access, signed(iss="us"), "no claim 'aud'")
    refused(access, signed(aud="aqt"), "no claim 'iss'")
    refused(access, signed(iss="them", aud="aqt"), "issuer")
    refused(access, signed(iss="us", aud="other"), "audience")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "no JSON web key set"),
        ("nonsense", "no JSON web key set"),
        ({"keys": []}, "no JSON web key set"),
        ({"keys": [oct_key(b"short")]}, "fewer than 32 bytes"),
        ({"keys": [{**oct_key(), "alg": "HS384"}]}, "no key for HS256 or RS256"),
    ],
)
def test_a_wrong_key_set_is_refused(tmp_path, content, match):
    with pytest.raises(AccessFileError, match=match):
        Authenticator(Access(auth_jwks=file(tmp_path, "jwks", content)), Tls())


def test_a_certificate_says_who_calls_only_where_no_token_does(tmp_path):
    mutual = Tls(tls_client_ca=tmp_path / "ca")
    assert Authenticator(Access(), mutual).identify(None, "client").name == "client"
    tokens = Access(auth_tokens=file(tmp_path, "t", f'a = "{TOKEN}"'))
    assert Authenticator(tokens, mutual).identify(None, "client") == ANONYMOUS
    assert Authenticator(Access(), Tls()).identify("Bearer x", None) == ANONYMOUS


def test_tokens_rotate_and_a_broken_file_changes_nothing(tmp_path, caplog):
    path = file(tmp_path, "t", f'a = "{TOKEN}"')
    found = Authenticator(Access(auth_tokens=path), Tls())

    def name(token):
        try:
            return found.identify(f"Bearer {token}", None).name
        except Unauthenticated:
            return None

    path.write_text(f"broken {OTHER}")
    eventually(lambda: name(TOKEN) == "a" and "cannot be read again" in caplog.text)
    path.unlink()
    eventually(lambda: name(TOKEN) == "a" and "No such file" in caplog.text)
    path.write_text(f'b = "{OTHER}"')
    eventually(lambda: name(OTHER) == "b")
    assert name(TOKEN) is None
    assert OTHER not in caplog.text
    assert TOKEN not in caplog.text


POLICY = """
[[allow]]
principals = ["team-*"]
actions = ["infer"]
models = ["digits", "iris-*"]

[[allow]]
principals = ["ops"]
actions = ["control", "metrics", "administer", "shared_memory"]
"""


def guard(tmp_path, policy=POLICY, **changes):
    tokens = file(tmp_path, "t", f'a = "{TOKEN}"')
    rules = file(tmp_path, "policy.toml", policy) if policy else None
    return Guard(Access(auth_tokens=tokens, auth_policy=rules, **changes), Tls())


def allowed(guard, name, action, model=""):
    return guard.allows(Principal(name), action, model)


def test_rules_allow_what_they_name_and_nothing_else(tmp_path):
    found = guard(tmp_path)
    assert allowed(found, "team-a", Action.INFER, "digits")
    assert allowed(found, "team-a", Action.INFER, "iris-2")
    assert allowed(found, "team-a", Action.READ, "digits")
    assert not allowed(found, "team-a", Action.INFER, "other")
    assert not allowed(found, "team-a", Action.READ, "other")
    assert not allowed(found, "team-a", Action.CONTROL, "digits")
    assert not allowed(found, "team-a", Action.SHARED_MEMORY)
    assert not allowed(found, "Team-a", Action.INFER, "digits")
    assert not allowed(found, "ops", Action.INFER, "digits")
    assert allowed(found, "ops", Action.CONTROL, "digits")
    assert allowed(found, "ops", Action.METRICS)
    assert not allowed(found, "nobody", Action.READ)
    assert allowed(found, "", Action.HEALTH)
    assert not allowed(found, "", Action.METRICS)
    with pytest.raises(PermissionDenied, match="'team-a' may not control on model 'digits'"):
        found.check(Principal("team-a"), Action.CONTROL, "digits")
    with pytest.raises(Unauthenticated, match="authorization: Bearer"):
        found.check(ANONYMOUS, Action.INFER, "digits")


def test_health_can_be_guarded_and_metrics_opened(tmp_path):
    found = guard(tmp_path, auth_exempt=(Exempt.METRICS,))
    assert not allowed(found, "", Action.HEALTH)
    assert not allowed(found, "", Action.REFLECTION)
    assert allowed(found, "", Action.METRICS)
    assert allowed(found, "anyone", Action.HEALTH)


def test_without_rules_whoever_is_known_may_and_without_authentication_everyone(tmp_path):
    assert allowed(guard(tmp_path, policy=None), "a", Action.CONTROL, "m")
    assert not allowed(guard(tmp_path, policy=None), "", Action.INFER, "m")
    assert Guard(Access(), Tls()).allows(ANONYMOUS, Action.ADMINISTER)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("[[allow]]\nprincipals = ['a']", "allow.0.actions: field required"),
        ("[[allow]]\nprincipals = ['a']\nactions = ['fly']", "allow.0.actions.0"),
        ("[[allow]]\nprincipals = 'a'\nactions = ['infer']", "allow.0.principals"),
        ("[[allow]]\nprincipals = ['a']\nactions = []\nmodel = []", "allow.0.model: unexpected"),
        ("[[deny]]\nprincipals = ['a']\nactions = []", r"\[\[allow\]\], and has \['deny'\]"),
        ("[[allow", "no TOML"),
    ],
)
def test_a_wrong_policy_is_refused_by_its_place(tmp_path, policy, match):
    with pytest.raises(AccessFileError, match=match):
        guard(tmp_path, policy=policy)


def test_every_rpc_needs_an_action():
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {m.name for m in service.methods} - {"ModelStreamInfer"} == set(_NEEDS)


def test_the_threat_model_names_tests_that_exist():
    tests = Path(__file__).parents[1]
    file = None
    for name, test in re.findall(
        r"`(?:(test_\w+\.py)::)?(test_\w+)`",
        (tests.parent / "docs" / "security.md").read_text(),
    ):
        file = name or file
        assert f"def {test}(" in (tests / "server" / file).read_text(), (file, test)
