"""Owns what a caller holds after submitting: a handle on each job, made only when it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from tqe.client.packing import Receipt
from tqe.errors import ResultUnavailable, SubmitError
from tqe.job import JobStatus, job_id, split_job_id
from tqe.store.forecast import Forecast

if TYPE_CHECKING:
    from tqe.client.aio import AsyncClient
    from tqe.client.sync import Client

H = TypeVar("H")


class _Named:
    """What both kinds of handle have in common: the id, whether this submission created it, whether it is
    tracked."""

    __slots__ = ("_client", "created", "frame_id", "index", "tracked")

    def __init__(
        self, client: Any, frame_id: bytes, index: int, *, created: bool = True, tracked: bool = True
    ) -> None:
        self._client = client
        self.frame_id = frame_id
        self.index = index
        self.created = created
        self.tracked = tracked

    @property
    def id(self) -> str:
        return job_id(self.frame_id, self.index)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and (self.frame_id, self.index) == (other.frame_id, other.index)

    def __hash__(self) -> int:
        return hash((self.frame_id, self.index))

    def _must_be_tracked(self) -> None:
        if not self.tracked:
            raise ResultUnavailable(f"job {self.id} was submitted with track=False: nothing is kept of it")


class JobHandle(_Named):
    """A submitted job. `created` is False when an idempotency key found the job that was there first."""

    __slots__ = ()
    _client: Client

    def status(self) -> str:
        """scheduled, queued, running, retrying, completed, dead, cancelled, unknown; untracked if nothing is
        kept of it."""
        return self.job().status if self.tracked else "untracked"

    def job(self) -> JobStatus:
        """All that is known of the job now."""
        return self._client.job(self.id)

    def forecast(self) -> Forecast:
        """How long the job will run and wait, in ms: as a worker has predicted it, else by the mean of its
        type; and by what goes before it in the order that is in use. Each None where nobody can say: nothing
        like it was timed yet, it is due later, or no worker lives."""
        return self._client.forecast(self.id)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job's end, at most `timeout` seconds, and return what its task returned.

        Raises JobFailed, JobWasCancelled, ResultTooLarge, ResultTimeout or ResultUnavailable.
        """
        self._must_be_tracked()
        return self._client.result(self.id, timeout)

    def cancel(self) -> str:
        """`cancelled`, or `requested` where a worker has to do it, or `too_late`, or `unknown`."""
        return self._client.cancel(self.id)


class AsyncJobHandle(_Named):
    """The same for asyncio."""

    __slots__ = ()
    _client: AsyncClient

    async def status(self) -> str:
        return (await self.job()).status if self.tracked else "untracked"

    async def job(self) -> JobStatus:
        return await self._client.job(self.id)

    async def forecast(self) -> Forecast:
        return await self._client.forecast(self.id)

    async def result(self, timeout: float | None = None) -> Any:
        self._must_be_tracked()
        return await self._client.result(self.id, timeout)

    async def cancel(self) -> str:
        return await self._client.cancel(self.id)


class _Handles(Sequence[H], Generic[H]):
    """Handles of a bulk submission in its order; each is made when it is looked at.

    `refused` has the items that were not accepted, by position; without any, `handles[i]` is item i.
    """

    def __init__(self, client: Any, receipt: Receipt) -> None:
        self._client = client
        self._receipt = receipt
        self._positions: Sequence[int] | None = None

    def _make(self, frame_id: bytes, index: int, created: bool) -> H:
        raise NotImplementedError

    @property
    def created(self) -> int:
        """How many jobs this submission created."""
        return self._receipt.created

    @property
    def duplicates(self) -> int:
        """How many items found their job there already."""
        return len(self._receipt.duplicates)

    @property
    def refused(self) -> Mapping[int, SubmitError]:
        return self._receipt.refused

    @property
    def ids(self) -> Iterator[str]:
        """Ids in order."""
        for position in self._places():
            found = self._receipt.find(position)
            yield self._receipt.duplicates[position] if found is None else job_id(*found)

    def _places(self) -> Sequence[int]:
        if self._positions is None:
            self._positions = self._receipt.positions()
        return self._positions

    def _at(self, position: int) -> H:
        found = self._receipt.find(position)
        if found is not None:
            return self._make(*found, True)
        return self._make(*split_job_id(self._receipt.duplicates[position]), False)

    def __len__(self) -> int:
        return self._receipt.accepted

    @overload
    def __getitem__(self, at: int) -> H: ...
    @overload
    def __getitem__(self, at: slice) -> list[H]: ...
    def __getitem__(self, at: int | slice) -> H | list[H]:
        places = self._places()
        if isinstance(at, slice):
            return [self._at(position) for position in places[at]]
        return self._at(places[at])

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} created={self.created} duplicates={self.duplicates}"
            f" refused={len(self.refused)}>"
        )


class JobHandles(_Handles[JobHandle]):
    """What `submit_many` returns."""

    def _make(self, frame_id: bytes, index: int, created: bool) -> JobHandle:
        return JobHandle(self._client, frame_id, index, created=created, tracked=self._receipt.tracked)


class AsyncJobHandles(_Handles[AsyncJobHandle]):
    """What `asubmit_many` returns."""

    def _make(self, frame_id: bytes, index: int, created: bool) -> AsyncJobHandle:
        return AsyncJobHandle(self._client, frame_id, index, created=created, tracked=self._receipt.tracked)
