"""Owns who may call: access tokens and their scopes; nothing that pages of others make a browser send."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections.abc import Sequence
from typing import Final

from starlette.requests import Request

from tqe import clock
from tqe.api.faults import Faults
from tqe.api.problems import Problem
from tqe.client import AsyncClient
from tqe.errors import TQEError
from tqe.store import tokens
from tqe.store.tokens import Scope, Table, Token
from tqe.telemetry import logs

PERIOD_S: Final = 1.0  # a token that is revoked is refused after that long
ANSWER_S: Final = 5.0  # a look that takes longer has failed
# Older tables are not gone by. Not much shorter, or each restart of Redis would turn callers away.
STALE_S: Final = 10.0
_AGAIN_S: Final = 0.25  # between looks that callers cause
_BEARER: Final = b"bearer "

_log = logs.get("api")


class Guard:
    """What one server process knows of the tokens, and whom it lets in by that."""

    def __init__(self, client: AsyncClient, *, loopback: bool, host: str, origins: Sequence[str]) -> None:
        self._client = client
        self._loopback = loopback
        self._host = host.lower()
        self._origins = frozenset(origin.encode() for origin in origins)
        self._table: Table | None = None
        self._read_ns = 0
        self._tried_ns = 0  # when the last look ended, whatever came of it
        self._looking = asyncio.Lock()
        self._faults = Faults()

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(PERIOD_S)

    async def _look(self) -> None:
        asked_ns = clock.monotonic_ns()
        try:
            found = await asyncio.wait_for(self._client.run(tokens.look(self._client.core.keys)), ANSWER_S)
        except (TQEError, TimeoutError):
            return  # the pulse logs that Redis is away
        except Exception as e:
            self._faults.note("the table of tokens", e)
            return
        finally:
            self._tried_ns = clock.monotonic_ns()
        if found.damaged and (self._table is None or self._table.damaged != found.damaged):
            _log.warning("records of tokens cannot be read", names=found.damaged)
        self._table, self._read_ns = found, asked_ns

    async def _known(self, since_ns: int) -> Table:
        """The tokens as they were then or later."""
        if self._read_ns < since_ns:
            async with self._looking:
                # Those who have waited for a look that failed do not each wait for one more.
                if self._read_ns < since_ns and clock.monotonic_ns() - self._tried_ns >= _AGAIN_S * 1e9:
                    await self._look()
        if self._table is None or self._read_ns < clock.monotonic_ns() - STALE_S * 1e9:
            detail = "Redis does not answer, so nobody can tell who may call: try again"
            raise Problem(503, "redis-unavailable", "Redis does not answer", detail, retry_after_s=1)
        return self._table

    async def _now(self) -> Table:
        """The tokens as they are, for one that is not known. Who makes up tokens waits a little, and costs
        Redis four looks a second at most, however many they are."""
        now_ns = clock.monotonic_ns()
        # A little longer: timers may be early by a part of a millisecond.
        await asyncio.sleep(max(0.0, _AGAIN_S + 0.005 - (now_ns - self._tried_ns) / 1e9))
        return await self._known(now_ns)

    async def admit(self, request: Request, scope: Scope, *, changes: bool) -> Token | None:
        """The caller's token, None where nobody needs one. Raises Problem for who may not do this."""
        hosts: list[bytes] = []
        origin = site = given = b""
        for name, value in request.scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"authorization":
                given = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        table = await self._known(clock.monotonic_ns() - int(STALE_S * 1e9))
        if self._loopback and not table.used:
            self._check_hosts(hosts)
            token = None
        else:
            token = await self._check_token(table, given, scope)
        if changes and (origin or site):
            self._check_origin(origin, site, hosts)
        return token

    async def _check_token(self, table: Table, given: bytes, scope: Scope) -> Token:
        if not given[: len(_BEARER)].lower() == _BEARER:
            raise _unauthorized("send `Authorization: Bearer TOKEN`; `tqe token create NAME` makes one")
        text = given[len(_BEARER) :].strip().decode("latin-1")
        token = table.find(text) or (await self._now()).find(text)
        if token is None:
            raise _unauthorized(
                "the token is unknown or was revoked; `tqe token list` shows those that are valid"
            )
        if not token.may(scope):
            detail = (
                f"this needs a token of the scope {scope}, and {token.name!r} has"
                f" {', '.join(sorted(token.scopes))}: `tqe token create NAME --scope {scope}` makes one"
            )
            raise Problem(403, "wrong-scope", "The token is not for this", detail, scope=scope)
        return token

    def _check_hosts(self, hosts: list[bytes]) -> None:
        """A page whose own name was made to lead to this machine (DNS rebinding) has our origin for the
        browser, which lets it read our answers. Its name in the Host header gives it away."""
        for host in hosts:
            if not _is_local(host.decode("latin-1"), self._host):
                detail = (
                    "without tokens only requests to this machine itself are taken, not to"
                    f" {host.decode('latin-1')[:80]!r}: use localhost, or `tqe token create NAME` and send it"
                )
                raise Problem(421, "wrong-host", "This server does not answer to that name", detail)

    def _check_origin(self, origin: bytes, site: bytes, hosts: list[bytes]) -> None:
        """Browsers send what pages of others ask for; they say whose page it was."""
        if origin in self._origins:
            return
        own = not origin or origin.partition(b"://")[2] in hosts
        if not own or site not in (b"", b"same-origin", b"none"):
            detail = (
                f"a page of {origin.decode('latin-1')[:80] or 'another site'} may not change anything here;"
                " the setting http_origins names pages that may"
            )
            raise Problem(403, "wrong-origin", "The request comes from a page of another site", detail)


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "no-valid-token", "A valid access token is needed", detail)


@functools.lru_cache(256)
def _is_local(host: str, own: str) -> bool:
    """Whether a Host header names this machine as itself."""
    name = host.lower().rpartition("]")[0].removeprefix("[") or host.lower().partition(":")[0]
    if name in ("localhost", own):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
