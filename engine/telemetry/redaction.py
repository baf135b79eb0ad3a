"""Owns what a log line must not tell: values under names of secrets, and logins in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

HIDDEN: Final = "***"
DEPTH_MAX: Final = 8  # a line must never be the thing that fails, whatever refers to itself in it

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS: Final = frozenset(
    {"password", "passwd", "pwd", "passphrase", "secret", "secrets", "authorization"}
    | {"credential", "credentials", "cookie", "apikey"}
)
_SECRET_LAST: Final = frozenset({"token", "jwt"})  # not `token_count`
_SECRET_PAIRS: Final = frozenset({"api key", "private key", "access key", "secret key", "session id"})
# What stands between the scheme and the last @ before a path: a password may hold an @ itself.
_LOGIN: Final = re.compile(r"(?<=://)[^/\s\"'<>]+(?=@)")
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")


@lru_cache(maxsize=2048)
def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret: `dbPassword`, `X-Api-Key`, `access_token`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    last = words[-1] in _SECRET_LAST or " ".join(words[-2:]) in _SECRET_PAIRS
    return last or not _SECRET_WORDS.isdisjoint(words)


def text(said: str) -> str:
    """The text without logins in addresses and without what stands behind `Bearer`."""
    if "://" in said:
        said = _LOGIN.sub(HIDDEN, said)
    return _BEARER.sub(rf"\1 {HIDDEN}", said) if "earer" in said or "asic" in said else said


def fields(told: Mapping[str, object]) -> dict[str, Any]:
    """The fields, each value redacted by its name and by what it says."""
    return {name: value(name, given) for name, given in told.items()}


def value(name: str, given: object, depth: int = 0) -> Any:
    """One value under a name; what lies in it as well."""
    if given is not None and not isinstance(given, bool) and is_secret(name):
        return HIDDEN
    if isinstance(given, str):
        return text(given)
    if depth >= DEPTH_MAX and isinstance(given, Mapping | list | tuple):
        return "…"
    if isinstance(given, Mapping):
        return {str(key): value(str(key), one, depth + 1) for key, one in given.items()}
    if isinstance(given, list | tuple):
        return [value("", one, depth + 1) for one in given]
    return given
