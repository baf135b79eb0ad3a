"""Owns the groups of dead jobs: read once for all who ask, and seldom while there are many."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tqe import clock
from tqe.api.documents import groups_document
from tqe.client import AsyncClient

KEPT_S: Final = 10.0
# Fewer are read within one round trip, and always. 10,000 with long errors are 80 MiB.
KEPT_FROM_JOBS: Final = 500


class Groups:
    """What the last reading found. All who want it meanwhile get the same."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._reading = asyncio.Lock()
        self._found: dict[str, Any] = {}
        self._read_ns = 0
        self._changes = 0

    @property
    def kept(self) -> bool:
        """Whether what was read last is shown for some seconds more."""
        many = self._found.get("jobs", 0) >= KEPT_FROM_JOBS
        return many and clock.monotonic_ns() - self._read_ns < KEPT_S * 1e9

    async def document(self) -> dict[str, Any]:
        """The newest dead jobs by type, reason and error, the largest group first."""
        asked_ns = clock.monotonic_ns()
        async with self._reading:
            if not self.kept and self._read_ns <= asked_ns:
                began_ns, changes = clock.monotonic_ns(), self._changes
                found = await groups_document(self._client)
                if changes != self._changes:
                    return found  # it may tell of jobs that have gone meanwhile
                self._found, self._read_ns = found, began_ns
            return self._found

    def forget(self) -> None:
        """Somebody here has changed what is dead."""
        self._found = {}
        self._changes += 1
