"""Whether a Redis server may be used: judged by its INFO alone, because managed servers deny CONFIG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

import redis

from tqe.errors import RedisUnavailable, ServerError, ServerUnfit

VERSION_MIN = (6, 2)
MEMORY_WARN_RATIO = 0.8

# First release of each line that closes the Lua holes of 2025 (CVE-2025-49844, -46817, -46818, -46819).
# A line that is older than all of these never got a fix; newer lines have it from their first release.
LUA_FIXED = {
    "redis": {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4},
}

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a server: `error` forbids its use, `warning` weakens a promise."""

    level: Level
    code: str
    text: str


class _HasInfo(Protocol):
    def info(self) -> Any: ...


def check(info: Mapping[str, Any]) -> list[Finding]:
    """Judge the fields of INFO (parsed or as strings), worst first. A field that is missing is not held
    against the server, except where a promise depends on it."""
    found = [
        *_check_version(info),
        *_check_role(info),
        *_check_eviction(info),
        *_check_persistence(info),
        *_check_memory(info),
    ]
    rank: dict[Level, int] = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.level])


def _check_version(info: Mapping[str, Any]) -> list[Finding]:
    product, text = _product(info)
    compatible = _numbers(str(info.get("redis_version", "")))  # what all products claim to be like
    numbers = _numbers(text) or compatible
    if numbers is None or compatible is None:
        return [Finding("warning", "version", "the server does not tell its version; 6.2 or newer is needed")]
    name = f"{product.capitalize()} {text}"
    if compatible[:2] < VERSION_MIN:
        return [Finding("error", "version", f"the server is {name} and 6.2 or newer is needed: upgrade it")]
    if product not in LUA_FIXED:
        return [Finding("warning", "product", f"the server is {name}, with which TQE has not been tested")]
    fixed = LUA_FIXED[product]
    line = numbers[:2]
    vulnerable = numbers[2] < fixed[line] if line in fixed else line < max(fixed)
    if not vulnerable:
        return []
    text = f"{name} has known holes in its Lua engine (CVE-2025-49844), unless your distribution fixed them"
    if str(info.get("tcp_port", "")) == "0":
        return [Finding("note", "cve", f"{text}; it listens on a private socket only")]
    return [Finding("warning", "cve", f"{text}: upgrade it, or let nobody else connect")]


def _check_role(info: Mapping[str, Any]) -> list[Finding]:
    role = str(info.get("role", "master"))
    if role == "master":
        return []
    master = f" ({info['master_host']}:{info.get('master_port', 6379)})" if info.get("master_host") else ""
    return [Finding("error", "role", f"the server is a read-only replica: connect to its master{master}")]


def _check_eviction(info: Mapping[str, Any]) -> list[Finding]:
    policy = str(info.get("maxmemory_policy", ""))
    if policy == "noeviction":
        return []
    how = (
        "set it with `redis-cli CONFIG SET maxmemory-policy noeviction` and in redis.conf, "
        "or in the parameter group of a managed server"
    )
    if not policy:
        text = f"the server does not tell its maxmemory-policy; it must be noeviction: {how}"
        return [Finding("warning", "eviction", text)]
    text = f"the server's maxmemory-policy is {policy}, so it may delete jobs when memory is full: {how}"
    return [Finding("error", "eviction", text)]


def _check_persistence(info: Mapping[str, Any]) -> list[Finding]:
    found = []
    if _is_on(info, "loading"):
        done = info.get("loading_loaded_perc", "?")
        found.append(
            Finding("error", "loading", f"the server is still loading its data ({done} %): try later")
        )
    if str(info.get("aof_enabled", "1")) == "0":
        text = (
            "the append-only file is off, so a crash of Redis loses jobs that were acknowledged: "
            "`redis-cli CONFIG SET appendonly yes`, and `appendonly yes` in redis.conf"
        )
        found.append(Finding("warning", "aof", text))
    for field in ("aof_last_write_status", "rdb_last_bgsave_status", "aof_last_bgrewrite_status"):
        if str(info.get(field, "ok")) != "ok":
            text = f"the server cannot save its data ({field} is {info[field]}): is its disk full?"
            found.append(Finding("warning", "disk", text))
    return found


def _check_memory(info: Mapping[str, Any]) -> list[Finding]:
    limit, used = _integer(info, "maxmemory"), _integer(info, "used_memory")
    if limit <= 0 or used < limit * MEMORY_WARN_RATIO:
        return []
    text = (
        f"the server uses {used * 100 // limit} % of its maxmemory ({limit} bytes); "
        "new jobs are refused when it is full"
    )
    return [Finding("warning", "memory", text)]


def _product(info: Mapping[str, Any]) -> tuple[str, str]:
    """Valkey and the others report a `redis_version` for compatibility, and their own beside it."""
    for product in ("valkey", "dragonfly", "keydb"):
        if info.get(f"{product}_version"):
            return product, str(info[f"{product}_version"])
    return "redis", str(info.get("redis_version", ""))


def _numbers(text: str) -> tuple[int, int, int] | None:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _is_on(info: Mapping[str, Any], field: str) -> bool:
    return str(info.get(field, "0")) not in ("0", "")


def _integer(info: Mapping[str, Any], field: str) -> int:
    try:
        return int(info.get(field, 0))
    except (TypeError, ValueError):
        return 0


# ------------------------------------------------------------------ before use


def require_fit(client: _HasInfo, *, url: str = "") -> Mapping[str, Any]:
    """Read INFO and return it, or raise RedisUnavailable or ServerUnfit with what to do."""
    try:
        info = client.info()
    except (redis.RedisError, OSError) as error:
        raise explain(error, url=url) from error
    return _require(info, url)


async def require_fit_async(client: Any, *, url: str = "") -> Mapping[str, Any]:
    """The same over an asyncio client."""
    try:
        info = await client.info()
    except (redis.RedisError, OSError) as error:
        raise explain(error, url=url) from error
    return _require(info, url)


def _require(info: Mapping[str, Any], url: str) -> Mapping[str, Any]:
    errors = [finding for finding in check(info) if finding.level == "error"]
    if not errors:
        return info
    at = f" at {redact(url)}" if url else ""
    text = f"Redis{at} cannot be used: " + "; ".join(finding.text for finding in errors)
    if all(finding.code == "loading" for finding in errors):
        raise RedisUnavailable(text)
    raise ServerUnfit(text)


def explain(error: Exception, *, url: str = "") -> ServerError:
    """The error of a client as one sentence of ours; never with the password."""
    at = f" at {redact(url)}" if url else ""
    said = redact_text(" ".join(str(error).split()), url)
    # Order matters: in redis-py the first three are kinds of ConnectionError.
    if isinstance(error, redis.AuthenticationError) or _says(said, "NOAUTH", "WRONGPASS", "invalid username"):
        return ServerUnfit(f"Redis{at} refuses the login: check user and password in the URL")
    if isinstance(error, redis.BusyLoadingError):
        return RedisUnavailable(f"Redis{at} is still loading its data: try later")
    if isinstance(error, redis.exceptions.MaxConnectionsError) or _says(said, "max number of clients"):
        return RedisUnavailable(f"Redis{at} has no connection left: raise its maxclients")
    if isinstance(error, redis.exceptions.NoPermissionError) or _says(said, "NOPERM"):
        return ServerUnfit(f"Redis{at} denies this user a command ({said}): extend the user's ACL")
    if isinstance(error, redis.ReadOnlyError):
        return ServerUnfit(f"Redis{at} is a read-only replica: connect to its master")
    if _says(said, "Protected mode", "DENIED"):
        return ServerUnfit(f"Redis{at} is in protected mode: give it a password, or bind it to localhost")
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return RedisUnavailable(f"Redis{at} does not answer in time: is it up, and is the network open?")
    if isinstance(error, redis.ConnectionError | OSError):
        return RedisUnavailable(f"Redis{at} cannot be reached ({said}): is it running, and is the URL right?")
    return RedisUnavailable(f"Redis{at} answered with an error: {said}")


def _says(text: str, *words: str) -> bool:
    return any(word.lower() in text.lower() for word in words)


def redact(url: str) -> str:
    """The URL without its login, nor secrets in its query. Rather too much is hidden than too little: a
    password may hold an unescaped `/`, `@` or `?`."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "***" if "@" in url else url
    login = rest.split("/", 1)[0] if scheme == "unix" else rest
    if "@" in login:
        cut = login.rindex("@")
        user = login.split(":", 1)[0] if ":" in login[:cut] else ""
        rest = f"{user}:***{rest[cut:]}"
    return scheme + separator + re.sub(r"(?i)([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*", r"\1***", rest)


def redact_text(text: str, url: str) -> str:
    """`text` without the password of `url`, should a library have quoted it."""
    try:
        secret = urlsplit(url).password
    except ValueError:
        return text
    for form in (secret, unquote(secret or "")):
        text = text.replace(form, "***") if form else text
    return text
