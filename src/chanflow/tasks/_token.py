"""Bearer tokens: whose each is, and what it allows; and the file that they are kept in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from hmac import compare_digest

from attrs import field, frozen

from chanflow._check import show

__all__ = ["SCOPES", "Token", "Tokens", "parse_tokens"]

SCOPES = ("read", "submit", "admin")
LINE = re.compile(r"(?:(?P<name>[^\[\]:]*?)\s*(?:\[(?P<scopes>[^\[\]]*)\])?\s*:\s+)?(?P<secret>\S*)")
"""A line of a file of tokens: `secret`, `name: secret` or `name[scope,scope]: secret`."""

UNNAMED = re.compile(r"[\[\]:]")
"""What a secret without a name may not have: it would be a name or scopes, misspelled."""


def to_scopes(scopes: Iterable[str]) -> frozenset[str]:
    # One word, or its letters would be taken for many.
    return frozenset([scopes] if isinstance(scopes, str) else scopes)


@frozen
class Token:
    """A bearer token of `TaskService.asgi`: whoever shows its secret may do what its scopes allow.

    Args:
        secret: 1 or more printable ASCII characters without a space at either end; it is in no `repr` and no log.
        name: whose it is, for the log, in printable characters; None for nobody's in particular. Two tokens may have
            one name, as while one replaces the other.
        scopes: one or more of "read", to see tasks, handlers and figures; "submit", to submit tasks, and to wait for
            the end of what was submitted; "admin", to cancel tasks, to run them again, and to list and replay dead
            letters. None includes another; all by default.

    Raises:
        ValueError, TypeError: an argument is not as said above.
    """

    secret: str = field(repr=False)
    name: str | None = field(default=None, kw_only=True)
    scopes: frozenset[str] = field(default=frozenset(SCOPES), converter=to_scopes, kw_only=True)

    def __attrs_post_init__(self) -> None:
        secret, name = self.secret, self.name
        if not isinstance(secret, str):
            msg = f"a token's secret must be a str, got a {type(secret).__name__}"
            raise TypeError(msg)
        if not secret or not secret.isascii() or not secret.isprintable() or secret != secret.strip():
            # Without the secret itself.
            msg = "a token's secret must be printable ASCII characters, one or more, without a space at either end"
            raise ValueError(msg)
        if name is not None and not (isinstance(name, str) and name and name.isprintable()):
            msg = f"a token's name must be printable characters, one or more, or None, got {show(name)}"
            raise ValueError(msg)
        if not self.scopes or not self.scopes <= set(SCOPES):
            told = ", ".join(sorted(map(str, self.scopes)))
            msg = f"a token's scopes must be one or more of {', '.join(SCOPES)}, got {told or 'none'}"
            raise ValueError(msg)


class Tokens:
    """The tokens of an app.

    Args:
        tokens: each a `Token`, or the secret of one with all scopes.

    Raises:
        ValueError, TypeError: they are none, or not all tokens.
    """

    def __init__(self, tokens: Sequence[str | Token]) -> None:
        if isinstance(tokens, str) or not tokens or not all(isinstance(token, str | Token) for token in tokens):
            # Without the tokens themselves.
            msg = f"tokens must be a sequence of one str or Token or more, or None, got a {type(tokens).__name__}"
            raise TypeError(msg)
        known = [token if isinstance(token, Token) else Token(token) for token in tokens]
        if len({token.secret for token in known}) < len(known):
            msg = "tokens must differ in their secrets, and two of them have the same"
            raise ValueError(msg)
        # Digests are of one length, so that comparing takes the same time for all.
        self._known = [(digest(token.secret), token) for token in known]

    def find(self, secret: str) -> Token | None:
        """Find the token that has a secret; None if there is none."""
        shown, found = digest(secret), None
        for each, token in self._known:
            # All of them, so that the time doesn't tell which one was close.
            if compare_digest(each, shown):
                found = token
        return found


def digest(token: str) -> bytes:
    """Give what is compared in place of a token."""
    return sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_tokens(data: bytes) -> list[Token]:
    """Read the tokens of a file: one a line, beside empty lines and those that begin with `#`.

    Raises:
        ValueError: a line, which is named, is none of a token, or there is no token.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        msg = "the file must be text in UTF-8"
        raise ValueError(msg) from None
    tokens: list[Token] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            try:
                tokens.append(parse_token(text))
            except ValueError as error:
                msg = f"line {number}: {error}"
                raise ValueError(msg) from None
    if not tokens:
        msg = "the file has no token"
        raise ValueError(msg)
    return tokens


def parse_token(text: str) -> Token:
    """Read a line of a file of tokens."""
    found = LINE.fullmatch(text)
    if found is None or found["name"] == "" or (found["name"] is None and UNNAMED.search(text)):
        # What stands there may be a secret.
        msg = "must be a secret without spaces, or `name: secret`, or `name[read,submit,admin]: secret`"
        raise ValueError(msg)
    scopes = found["scopes"]
    allowed = SCOPES if scopes is None else [each.strip() for each in scopes.split(",")]
    return Token(found["secret"], name=found["name"], scopes=allowed)
