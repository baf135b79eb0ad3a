"""Owns what a log line must not tell: values under names of secrets, logins in addresses, and our tokens."""

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
_OWN_TOKEN: Final = re.compile(r"\b(tqe_[A-Za-z0-9.-]{1,64}_)[0-9a-f]{64}")
# `password=x`, `token = 'x'`, `"secret": "x"`. To the end of the word: what stands in a password is unknown.
_PAIR: Final = re.compile(
    r"""(["']?)\b([A-Za-z][\w.-]{1,63})(\1(?:\s*=+\s*|(?<=["'])\s*:\s*))("[^"\n]*"?|'[^'\n]*'?|[^\s&"']+)"""
)


@lru_cache(maxsize=2048)
def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret: `dbPassword`, `X-Api-Key`, `access_token`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    last = words[-1] in _SECRET_LAST or " ".join(words[-2:]) in _SECRET_PAIRS
    return last or not _SECRET_WORDS.isdisjoint(words)


def text(said: str) -> str:
    """The text without logins in addresses, without what stands behind `Bearer` or `password=`, and without
    the secret part of our own tokens."""
    if "://" in said:
        said = _LOGIN.sub(HIDDEN, said)
    if "tqe_" in said:
        said = _OWN_TOKEN.sub(rf"\1{HIDDEN}", said)
    if "=" in said or ":" in said:
        said = _PAIR.sub(_without_secret, said)
    return _BEARER.sub(rf"\1 {HIDDEN}", said) if "earer" in said or "asic" in said else said


def _without_secret(pair: re.Match[str]) -> str:
    quote, name, between, _ = pair.groups()
    return f"{quote}{name}{between}{HIDDEN}" if is_secret(name) else pair[0]


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
