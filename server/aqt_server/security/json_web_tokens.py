"""JSON web tokens: whether one is valid, and of whom it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt

from aqt_server.errors import Unauthenticated
from aqt_server.security.authentication import AccessFileError

_ALGORITHMS = ("HS256", "RS256")
_LEAST_HS256_KEY = 32


class Keys:
    """The keys of a JSON web key set that sign with one of the algorithms that are taken here.

    Raises:
      AccessFileError: `file` has none, or one that can be guessed.
    """

    def __init__(self, file: Path):
        try:
            keys = jwt.PyJWKSet.from_json(file.read_text()).keys
        except (ValueError, AttributeError, jwt.PyJWTError):
            raise AccessFileError(
                f"{file} is no JSON web key set with a key that can be used"
            ) from None
        self._keys = [key for key in keys if key.algorithm_name in _ALGORITHMS]
        if not self._keys:
            raise AccessFileError(f"{file} has no key for {' or '.join(_ALGORITHMS)}")
        for key in self._keys:
            if key.algorithm_name == "HS256" and len(key.key) < _LEAST_HS256_KEY:
                raise AccessFileError(
                    f"{file}: key {key.key_id!r} for HS256 has fewer than {_LEAST_HS256_KEY} bytes "
                    f"and can be guessed; make a longer one"
                )

    def subject(self, token: str, *, audience: str | None, issuer: str | None) -> str:
        """Whose token it is.

        Raises:
          Unauthenticated: it is not valid, or not of this audience or issuer.
        """
        try:
            wanted = jwt.get_unverified_header(token).get("kid")
            fitting = [key for key in self._keys if wanted is None or key.key_id == wanted]
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
                audience=audience,
                issuer=issuer,
                options={"require": ["exp", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not valid: {_reason(error)}") from None
        if not claims["sub"]:
            raise Unauthenticated("the token is not valid: its subject is empty")
        return claims["sub"]


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
