"""Who calls: by a static token, by a JSON web token, or by the certificate of the connection.

Where tokens are configured, a token says who calls, and a certificate alone does not: it may be a
proxy's. Without tokens, the name in the client's certificate does. A message never repeats a token.
"""

import dataclasses
import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt

from aqt_server.errors import Unauthenticated
from aqt_server.security.watched import Watched
from aqt_server.settings import Access, Tls

_ALGORITHMS = ("HS256", "RS256")
_LEAST_TOKEN = 16
_LEAST_HS256_KEY = 32


class AccessFileError(ValueError):
    """A file of tokens, keys or rules cannot be used; the message repeats no secret."""


@dataclasses.dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, by name."""

    name: str


ANONYMOUS = Principal("")
"""Whoever shows nothing."""


class Authenticator:
    """Tells principals by what they show, as the settings have it.

    Raises:
      AccessFileError: a file that the settings name cannot be used.
    """

    def __init__(self, access: Access, tls: Tls):
        self._access = access
        self._tokens: Watched[dict[str, str]] | None = None
        self._keys: Watched[list[jwt.PyJWK]] | None = None
        if tokens := access.auth_tokens:
            self._tokens = _watched(tokens, lambda: _read_tokens(tokens))
        if jwks := access.auth_jwks:
            self._keys = _watched(jwks, lambda: _read_keys(jwks))
        self.by_token = bool(self._tokens or self._keys)
        """Whether a token is what says who calls."""
        self.by_certificate = tls.tls_client_ca is not None and not self.by_token
        """Whether the name in the client's certificate is."""
        self.required = self.by_token or self.by_certificate
        """Whether who calls is asked for at all."""

    def identify(self, authorization: str | None, certificate_name: str | None) -> Principal:
        """Who calls, or ANONYMOUS if they show nothing that would say so.

        `authorization` is the header of that name; `certificate_name` is from a client certificate
        that the connection was accepted with.

        Raises:
          Unauthenticated: what they show is not valid.
        """
        if not self.by_token:
            return Principal(certificate_name) if certificate_name else ANONYMOUS
        if authorization is None:
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("the authorization header is of the form `Bearer TOKEN`")
        known = self._tokens.value.get(_digest(token)) if self._tokens else None
        if known:
            return Principal(known)
        if self._keys and token.count(".") == 2:
            return self._from_jwt(token, self._keys.value)
        raise Unauthenticated("the token is not known here: send one that is, or renew it")

    def _from_jwt(self, token: str, keys: list[jwt.PyJWK]) -> Principal:
        try:
            wanted = jwt.get_unverified_header(token).get("kid")
            fitting = [key for key in keys if wanted is None or key.key_id == wanted]
            if len(fitting) != 1:
                raise Unauthenticated(
                    "the token was signed with a key that is not known here: send one of the "
                    "issuer that this server trusts, with the id of its key"
                )
            claims: Mapping[str, Any] = jwt.decode(
                token,
                fitting[0],
                # The key says how it signs, and the token has no say in that.
                algorithms=[fitting[0].algorithm_name],
                audience=self._access.auth_audience,
                issuer=self._access.auth_issuer,
                options={"require": ["exp", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not valid: {_reason(error)}") from None
        if not claims["sub"]:
            raise Unauthenticated("the token is not valid: its subject is empty")
        return Principal(claims["sub"])


def _reason(error: jwt.PyJWTError) -> str:
    # Only what is about claims: other messages may repeat parts of the token.
    if isinstance(error, jwt.InvalidAudienceError):
        return "its audience is not this server's"
    if isinstance(error, jwt.InvalidIssuerError):
        return "its issuer is not the one that this server trusts"
    if isinstance(error, jwt.ExpiredSignatureError):
        return "it has expired; renew it"
    if isinstance(error, jwt.ImmatureSignatureError):
        return "its time has not begun"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no claim {error.claim!r}"
    return "its signature or form is wrong"


def _watched(file: Path, read: Any) -> Watched[Any]:
    try:
        return Watched([file], read)
    except OSError as error:
        raise AccessFileError(f"{file} cannot be read: {error.strerror}") from error


def _digest(token: str) -> str:
    # Looked up by digest, so that the time of a look-up says nothing of any token.
    return hashlib.sha256(token.encode()).hexdigest()


def _read_tokens(file: Path) -> dict[str, str]:
    """Names by the digest of their token, from lines `name = "token"`."""
    try:
        named = tomllib.loads(file.read_text())
    except ValueError:
        # What the parser says may repeat a part of the file.
        raise AccessFileError(f'{file} is no TOML file of lines `name = "token"`') from None
    tokens: dict[str, str] = {}
    for name, token in named.items():
        if not name or not isinstance(token, str) or len(token) < _LEAST_TOKEN:
            raise AccessFileError(
                f"{file}: the token of {name!r} is no text of {_LEAST_TOKEN} characters or more; "
                f"make one with `openssl rand -hex 32`"
            )
        if _digest(token) in tokens:
            raise AccessFileError(f"{file}: {name!r} has the token of {tokens[_digest(token)]!r}")
        tokens[_digest(token)] = name
    return tokens


def _read_keys(file: Path) -> list[jwt.PyJWK]:
    """The keys of a JSON web key set that sign with one of the algorithms that are taken here."""
    try:
        keys = jwt.PyJWKSet.from_json(file.read_text()).keys
    except (ValueError, AttributeError, jwt.PyJWTError):
        raise AccessFileError(
            f"{file} is no JSON web key set with a key that can be used"
        ) from None
    fitting = [key for key in keys if key.algorithm_name in _ALGORITHMS]
    if not fitting:
        raise AccessFileError(f"{file} has no key for {' or '.join(_ALGORITHMS)}")
    for key in fitting:
        if key.algorithm_name == "HS256" and len(key.key) < _LEAST_HS256_KEY:
            raise AccessFileError(
                f"{file}: key {key.key_id!r} for HS256 has fewer than {_LEAST_HS256_KEY} bytes and "
                f"can be guessed; make a longer one"
            )
    return fitting
