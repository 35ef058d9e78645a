"""Who calls: by a static token, by a JSON web token, or by the certificate of the connection.

Where tokens are configured, a token says who calls, and a certificate alone does not: it may be a
proxy's. Without tokens, the name in the client's certificate does. A message never repeats a token.
"""

import dataclasses
import hashlib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from aqt_server.errors import Unauthenticated
from aqt_server.security.watched import Watched, of_setting
from aqt_server.settings import Access, Tls

if TYPE_CHECKING:
    from aqt_server.security.json_web_tokens import Keys

_LEAST_TOKEN = 16


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
        self._keys: Watched[Keys] | None = None
        if tokens := access.auth_tokens:
            self._tokens = of_setting(
                "--auth-tokens", tokens, lambda: _read_tokens(tokens), AccessFileError
            )
        if jwks := access.auth_jwks:
            # Only for whom has such keys: what they are checked with takes as long to import as
            # reading a small model.
            from aqt_server.security import json_web_tokens

            self._keys = of_setting(
                "--auth-jwks", jwks, lambda: json_web_tokens.Keys(jwks), AccessFileError
            )
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
            access = self._access
            name = self._keys.value.subject(
                token, audience=access.auth_audience, issuer=access.auth_issuer
            )
            return Principal(name)
        raise Unauthenticated("the token is not known here: send one that is, or renew it")


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
