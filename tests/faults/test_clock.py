"""A wall clock that jumps: no queue, deadline, rate or batch follows it, and tokens do."""

import asyncio
import datetime
import json
import os
import time

import jwt
import numpy as np
import pytest

from aqt_server.errors import Unauthenticated
from aqt_server.security import watched
from aqt_server.security.authentication import Authenticator
from aqt_server.security.tls import Certificates
from aqt_server.settings import Access, Tls
from bundles import FEATURES, write_linear
from faults.inside import inside
from server.certificates import Authority
from server.messages import MODEL, request_of

DAY_S = 86400.0


@pytest.mark.slow
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_jump_of_the_wall_clock_ends_no_request(tmp_path, monkeypatch, jump_s):
    write_linear(tmp_path / MODEL / "1")
    request = request_of(np.ones((3, FEATURES), np.float32))
    request.parameters["timeout"].int64_param = 5_000_000
    sent = request.SerializeToString()
    now, now_ns = time.time, time.time_ns

    async def check():
        async with inside(tmp_path) as door:
            assert await door.send(sent) == "OK"
            monkeypatch.setattr(time, "time", lambda: now() + jump_s)
            monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
            statuses = await asyncio.gather(*(door.send(sent) for _ in range(50)))
            assert set(statuses) == {"OK"}
            monkeypatch.undo()
            assert await door.send(sent) == "OK"

    asyncio.run(check())


class Clock(datetime.datetime):
    """What PyJWT reads the time from, some seconds ahead."""

    ahead_s = 0.0

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(seconds=cls.ahead_s)


def test_a_token_holds_by_the_wall_clock_as_it_is(tmp_path, monkeypatch):
    """It is refused while the clock is outside its time, and taken again afterwards."""
    key = "k" * 43
    (tmp_path / "keys").write_text(json.dumps({"keys": [{"kty": "oct", "alg": "HS256", "k": key}]}))
    authenticator = Authenticator(Access(auth_jwks=tmp_path / "keys"), Tls())
    now = int(time.time())
    claims = {"sub": "a", "nbf": now - 60, "exp": now + 600}
    token = jwt.encode(claims, jwt.utils.base64url_decode(key), "HS256")
    monkeypatch.setattr("jwt.api_jwt.datetime", Clock)
    for ahead_s, told in ((0.0, None), (DAY_S, "expired"), (0.0, None), (-DAY_S, "not begun")):
        monkeypatch.setattr(Clock, "ahead_s", ahead_s)
        if told:
            with pytest.raises(Unauthenticated, match=told):
                authenticator.identify(f"Bearer {token}", None)
        else:
            assert authenticator.identify(f"Bearer {token}", None).name == "a"


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_certificate_that_is_renewed_after_a_jump_is_read(tmp_path, monkeypatch, jump_s):
    """Whether it looks newer than the one before it, or older."""
    monkeypatch.setattr(watched, "_LOOK_S", -1.0)
    authority = Authority()
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"

    def renew():
        for file, content in zip((key, certificate), authority.sign("server"), strict=True):
            file.write_bytes(content)

    renew()
    certificates = Certificates(Tls(tls_certificate=certificate, tls_key=key))
    context, before = certificates.for_http(), time.time()
    first, second = Shown(context), Shown(context)
    context.sni_callback(first, None, context)
    renew()
    for file in (key, certificate):
        os.utime(file, (before + jump_s, before + jump_s))
    context.sni_callback(second, None, context)
    assert second.context is not first.context


class Shown:
    """A connection, to which a context is given."""

    def __init__(self, context):
        self.context = context
