"""Which Redis a command meets: its address, its INFO, what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from tqe.errors import TQEError
from tqe.settings import Settings
from tqe.store import embedded, fitness
from tqe.store.call import SyncDoor
from tqe.store.embedded import EmbeddedServer, parse_info
from tqe.store.link import SyncLink


@dataclass(frozen=True, slots=True)
class Met:
    """A server that answers and may be used. `own` is our hold on the embedded one, None for another."""

    url: str
    info: Mapping[str, str]
    own: EmbeddedServer | None

    @property
    def name(self) -> str:
        """Its product and version."""
        if self.info.get("valkey_version"):
            return f"Valkey {self.info['valkey_version']}"
        return f"Redis {self.info.get('redis_version', 'of unknown version')}"

    @property
    def place(self) -> str:
        """What it is and where, in words, without its password."""
        if self.own is not None:
            return f"embedded {self.name}, pid {self.own.pid}, at {self.own.socket}"
        return f"{self.name} at {fitness.redact(self.url)}"

    @property
    def findings(self) -> list[fitness.Finding]:
        return fitness.check(self.info)


class Meeting:
    """A connection to the server of the settings, for a moment; `met` is what was found.

    Nothing of it is left open at the end but the hold on an embedded server, which is the caller's.
    """

    def __init__(self, settings: Settings) -> None:
        self._own = None if settings.redis_url else embedded.ensure(settings.data_dir)
        url = settings.redis_url or (self._own.url if self._own else "")
        self._link = SyncLink(replace(settings, redis_url=url))
        try:
            self.door: SyncDoor = self._link.door()
            self.met = Met(url, self._info(), self._own)
        except BaseException:
            self._link.close()
            if self._own is not None:
                self._own.close()
            raise

    def _info(self) -> Mapping[str, str]:
        (answer,) = self.door.send([("INFO",)])
        if isinstance(answer, TQEError):
            raise answer
        return parse_info(answer.decode("utf-8", "replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()
