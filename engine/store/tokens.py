"""Owns the access tokens of the REST API in Redis: what is kept of one, and how a caller's is recognised.

The hash `tokens` has a field a token, by its name, with JSON of its scopes, its digest and when it was made,
and the field `*`, which stays when the last token is revoked: that must lock everybody out, not let everybody
in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from tqe.job import to_datetime, to_iso
from tqe.store.keys import Keys
from tqe.store.reading import ask
from tqe.store.steps import Steps

Scope = Literal["submit", "read", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
TOKENS_MAX: Final = 1_000  # servers read all of them each second
_PREFIX: Final = "tqe_"
_SECRET_BYTES: Final = 32
_TEXT_MAX: Final = 200
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_USED: Final = "*"


class Token(NamedTuple):
    """One token as it stands in Redis; its secret does not."""

    name: str
    scopes: frozenset[str]
    digest: str
    created_ms: int

    def as_dict(self) -> dict[str, Any]:
        """The shape of `tqe token list --json`."""
        return {
            "name": self.name,
            "scopes": [scope for scope in SCOPES if scope in self.scopes],
            "created": to_iso(to_datetime(self.created_ms)),
        }

    def may(self, scope: Scope) -> bool:
        """Whether it reaches so far. `admin` is all of them."""
        return scope in self.scopes or "admin" in self.scopes


class _Record(msgspec.Struct):
    scopes: list[Scope]
    sha256: str
    created_ms: int


@dataclass(frozen=True, slots=True)
class Table:
    """All tokens at one moment; `damaged` are names whose record cannot be read. `used`: there are some, or
    there were and the last has been revoked."""

    tokens: Mapping[str, Token]
    used: bool
    damaged: tuple[str, ...] = ()

    def find(self, text: str) -> Token | None:
        """Whose token this is; None for what is none."""
        name, _, secret = text[:_TEXT_MAX].removeprefix(_PREFIX).rpartition("_")
        token = self.tokens.get(name)
        # In constant time, although there is nothing to learn from a hash bit by bit.
        if token is None or not hmac.compare_digest(_digest(secret), token.digest):
            return None
        return token


def _digest(secret: str) -> str:
    """SHA-256 without salt or rounds: those slow down guessing what people think up. Nobody guesses 256
    random bits, and this is computed for each request."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def look(keys: Keys) -> Steps[Table]:
    """All of them."""
    return _table((yield from ask(("HGETALL", keys.tokens)))[0])


def _table(flat: Sequence[bytes]) -> Table:
    found: dict[str, Token] = {}
    damaged: list[str] = []
    for field, value in zip(flat[::2], flat[1::2], strict=True):
        name = field.decode("utf-8", "replace")
        if name == _USED:
            continue
        record: _Record | None = None
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            record = msgspec.json.decode(value, type=_Record)
        # Digests are compared as text, which takes ASCII only.
        if record is None or not record.sha256.isascii():
            damaged.append(name)
            continue
        found[name] = Token(name, frozenset(record.scopes), record.sha256, record.created_ms)
    return Table(found, bool(flat), tuple(damaged))


def create(keys: Keys, name: str, scopes: Sequence[Scope], now_ms: int) -> Steps[str]:
    """Make a token; its text, which nobody can read again. Raises ValueError if the name is taken or no
    name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a token: 1 to 64 of A-Z a-z 0-9 . -")
    if not scopes:
        raise ValueError(f"a token needs at least one scope of {', '.join(SCOPES)}")
    if len((yield from look(keys)).tokens) >= TOKENS_MAX:
        raise ValueError(f"there are {TOKENS_MAX} tokens, which is the most: revoke some")
    secret = secrets.token_hex(_SECRET_BYTES)
    record = msgspec.json.encode(_Record([one for one in SCOPES if one in scopes], _digest(secret), now_ms))
    *_, held = yield from ask(
        ("HSET", keys.tokens, _USED, 1),
        ("HSETNX", keys.tokens, name, record),
        ("HGET", keys.tokens, name),
    )
    # Not by what HSETNX says: after a lost reply it is sent again.
    if held != record:
        raise ValueError(f"there is a token {name!r} already: revoke it, or take another name")
    return f"{_PREFIX}{name}_{secret}"


def revoke(keys: Keys, names: Sequence[str]) -> Steps[None]:
    """Servers refuse these tokens from their next look on."""
    yield from ask(("HDEL", keys.tokens, *names))


def forget(keys: Keys) -> Steps[None]:
    """Drop all tokens, and that there were some: servers on loopback take anybody again."""
    yield from ask(("DEL", keys.tokens))
