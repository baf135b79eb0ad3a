"""The client for asyncio: the same procedures, and jobs that are submitted in one turn of the loop travel
together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from tqe.client.core import Core, Progress
from tqe.client.handles import AsyncJobHandle, AsyncJobHandles
from tqe.client.packing import Item, Packer, Parcel, Receipt
from tqe.errors import SubmitUnknown, TQEError
from tqe.job import JobStatus, SubmitOptions, split_job_id
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store import producing, reading
from tqe.store.forecast import Forecast, forecast
from tqe.store.link import AsyncLink
from tqe.store.steps import Steps

T = TypeVar("T")

FLUSH_JOBS_MAX: Final = 1_000
ROUTES_MAX: Final = 10_000

_Promise: TypeAlias = "asyncio.Future[AsyncJobHandle]"


class AsyncClient:
    """Submits jobs from one event loop and reads what became of them."""

    def __init__(
        self, settings: Settings, *, registry: Registry | None = None, link: AsyncLink | None = None
    ) -> None:
        self.core = Core(settings, registry, self._handles)
        self.link = link or AsyncLink(settings)
        self._registered = self.core.registry.get
        self._encode = self.core.encoder.encode
        self._loop: asyncio.AbstractEventLoop | None = None
        self._routes: dict[str, _Route] = {}  # by type, of submissions that give no option
        self._trays: dict[tuple[str, bool], _Tray] = {}  # by lane, and whether tracked
        self._items: list[tuple[Item, _Promise]] = []
        self._waiting = 0  # submissions in trays and items
        self._sending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Send what is waiting, then disconnect."""
        while self._waiting or self._sending:
            self._flush()
            await asyncio.gather(*self._sending, return_exceptions=True)
        await self.link.close()
        self._loop = None

    async def run(self, steps: Steps[T]) -> T:
        """Carry out a procedure of the store."""
        return await self.link.run(steps)

    async def connect(self) -> None:
        """Connect now, to learn early of a server that is not there or not fit."""
        await self.link.door()

    # -------------------------------------------------------------- submitting

    async def submit(self, type_name: str, payload: Any, **options: Any) -> AsyncJobHandle:
        """One job. Options: priority, delay, run_at, timeout, max_retries, expires, idempotency_key,
        track.

        Submissions of one turn of the loop go out in shared frames; each caller gets its own outcome. A
        caller that is cancelled while it waits does not take its job back.
        """
        # Asked for once: each look at the running loop is a system call.
        loop = self._loop or self._begin()
        promise: _Promise
        if options:
            item = self.core.item(type_name, payload, options)
            del payload
            promise = loop.create_future()
            self._items.append((item, promise))
        else:
            route = self._routes.get(type_name) if type(type_name) is str else None
            if route is None or route.task is not self._registered(type_name):
                route = self._route(type_name)
            kind, task, tray = route
            encoded = self._encode(payload, task)
            del payload  # or it would live as long as Redis takes
            promise = loop.create_future()
            tray.types.append(kind)
            tray.payloads.append(encoded)
            tray.promises.append(promise)
        self._waiting += 1
        if self._waiting == 1:
            loop.call_soon(self._flush)
        elif self._waiting >= FLUSH_JOBS_MAX:
            self._flush()
        return await promise

    def _begin(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        return self._loop

    def _route(self, type_name: str) -> _Route:
        """Where submissions of the type go that give no option. Raises what refuses them."""
        name, task = self.core.task(type_name)
        options = self.core.options(task, {})
        where = options.lane, options.track
        tray = self._trays.get(where)
        if tray is None:
            tray = self._trays[where] = _Tray(options)
        if len(self._routes) >= ROUTES_MAX:
            self._routes.clear()
        route = self._routes[name] = _Route(name.encode(), task, tray)
        return route

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._waiting = 0
        full = [tray.emptied() for tray in self._trays.values() if tray.payloads]
        items, self._items = self._items, []
        task = (self._loop or self._begin()).create_task(self._send(full, items))
        # The loop keeps only weak references: without this one the task could vanish half-way.
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, trays: list[_Tray], items: list[tuple[Item, _Promise]]) -> None:
        promises = [promise for tray in trays for promise in tray.promises]
        promises += [promise for _, promise in items]
        parcels: list[Parcel] = []
        try:
            packer = Packer(self.core.make)
            first = 0
            for tray in trays:
                places = range(first, first + len(tray.payloads))
                parcels += packer.extend(tray.options, places, tray.types, tray.payloads)
                first = places.stop
            for position, (item, _) in enumerate(items, first):
                parcels += packer.add(item._replace(position=position))
            parcels += packer.close()
            for batch in self.core.calls(parcels):
                await self._call(batch, promises)
        except Exception as e:  # a mistake of ours must not leave callers waiting for ever
            for promise in promises:
                if not promise.done():
                    promise.set_exception(e)

    async def _call(self, batch: list[Parcel], promises: list[_Promise]) -> None:
        receipt = Receipt()
        failure: BaseException | None = None
        try:
            await self.run(self.core.send(batch, receipt))
        except (TQEError, asyncio.CancelledError) as e:
            failure = e
        all_created = failure is None and not receipt.refused and not receipt.duplicates
        for frame, runs in batch:
            tracked = bool(frame.value)
            for position, n, frame_id, base in runs:
                for index, promise in enumerate(promises[position : position + n], base):
                    if promise.done():  # its caller was cancelled
                        continue
                    job = AsyncJobHandle(self, frame_id, index, tracked=tracked)
                    if all_created:
                        promise.set_result(job)
                    else:
                        _tell(promise, job, receipt, position + index - base, failure)

    async def submit_many(
        self,
        items: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> AsyncJobHandles:
        """Many jobs; see Client.submit_many."""
        steps = self.core.submit_mixed(items, options, collect=collect, progress=progress)
        return self._handles(await self.run(steps))

    async def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> AsyncJobHandles:
        """Many jobs of one type: several times faster than `submit_many`."""
        steps = self.core.submit_of(task, payloads, options, collect=collect, progress=progress)
        return self._handles(await self.run(steps))

    def _handles(self, receipt: Receipt) -> AsyncJobHandles:
        return AsyncJobHandles(self, receipt)

    # -------------------------------------------------------------- one job

    async def job(self, name: str) -> JobStatus:
        """What is known of a job. ValueError if the text is no job id."""
        return (await self.run(reading.job_record(self.core.keys, *split_job_id(name)))).status

    async def forecast(self, name: str) -> Forecast:
        """How long a job will run and wait, as far as anybody can say; see JobHandle.forecast."""
        return await self.run(forecast(self.core.keys, self.core.settings.lanes, await self.job(name)))

    async def result(self, name: str, timeout: float | None = None) -> Any:
        """Wait for a job's result; see JobHandle.result."""
        return await self.run(self.core.result(*split_job_id(name), timeout))

    async def cancel(self, name: str) -> str:
        """Ask for a job not to run; see JobHandle.cancel."""
        return await self.run(self.core.cancel(*split_job_id(name)))

    def handle(self, name: str) -> AsyncJobHandle:
        """A handle on a job that somebody else submitted."""
        return AsyncJobHandle(self, *split_job_id(name), created=False)

    # -------------------------------------------------------------- the queue

    async def status(self) -> reading.QueueStatus:
        return await self.run(reading.queue_status(self.core.keys, self.core.settings.lanes))

    async def workers(self) -> list[reading.WorkerStatus]:
        return await self.run(reading.workers(self.core.keys))

    async def pause(self, lane: str) -> None:
        """Workers take nothing from the lane until it is resumed."""
        await self.run(producing.pause_lane(self.core.keys, self.core.lane(lane)))

    async def resume(self, lane: str) -> None:
        await self.run(producing.resume_lane(self.core.keys, self.core.lane(lane)))

    async def purge_lane(self, lane: str) -> int:
        """Cancel all jobs that wait in the lane; how many there were."""
        return await self.run(self.core.purge_lane(lane))

    # -------------------------------------------------------------- dead letters

    async def dead_page(
        self,
        *,
        type_name: str | None = None,
        reason: str | None = None,
        cursor: reading.Cursor | None = None,
    ) -> reading.DeadPage:
        """A page of dead jobs, newest first."""
        steps = reading.dead_jobs(self.core.keys, type_name=type_name, reason=reason, cursor=cursor)
        return await self.run(steps)

    async def dead_jobs(
        self, *, type_name: str | None = None, reason: str | None = None
    ) -> AsyncIterator[reading.DeadJob]:
        """All dead jobs that match, newest first, read page by page."""
        cursor = None
        while True:
            page = await self.dead_page(type_name=type_name, reason=reason, cursor=cursor)
            for job in page.jobs:
                yield job
            cursor = page.cursor
            if cursor is None:
                return

    async def dead_job(self, name: str) -> reading.DeadJob | None:
        """One dead job with its payload."""
        return await self.run(reading.dead_job(self.core.keys, name))

    async def replay(self, *names: str) -> producing.Replayed:
        """Run dead jobs again, from their first attempt."""
        return await self.run(self.core.replay_these(names))

    async def replay_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> producing.Replayed:
        return await self.run(self.core.replay_all(type_name=type_name, reason=reason, progress=progress))

    async def purge(self, *names: str) -> int:
        """Drop dead jobs for good; how many there were."""
        return await self.run(self.core.purge_these(names))

    async def purge_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> int:
        return await self.run(self.core.purge_all(type_name=type_name, reason=reason, progress=progress))


class _Tray:
    """Submissions of one turn that may share a frame: the type and the payload of each, and who waits."""

    __slots__ = ("options", "payloads", "promises", "types")

    def __init__(self, options: SubmitOptions) -> None:
        self.options = options
        self.types: list[bytes] = []
        self.payloads: list[bytes] = []
        self.promises: list[_Promise] = []

    def emptied(self) -> _Tray:
        """What is in it, taken out; jobs of one type side by side, which keeps records short."""
        taken = _Tray(self.options)
        taken.types, taken.payloads, taken.promises = self.types, self.payloads, self.promises
        self.types, self.payloads, self.promises = [], [], []
        if taken.types.count(taken.types[0]) != len(taken.types):
            order = sorted(range(len(taken.types)), key=taken.types.__getitem__)
            taken.types = [taken.types[at] for at in order]
            taken.payloads = [taken.payloads[at] for at in order]
            taken.promises = [taken.promises[at] for at in order]
        return taken


class _Route(NamedTuple):
    """How submissions of one type go that give no option."""

    kind: bytes
    task: Task[..., Any] | None
    tray: _Tray


def _tell(
    future: _Promise,
    job: AsyncJobHandle,
    receipt: Receipt,
    position: int,
    failure: BaseException | None,
) -> None:
    """Give one caller its own outcome of a call that it shared with others."""
    if isinstance(failure, asyncio.CancelledError):
        future.cancel()
    elif isinstance(failure, SubmitUnknown):
        own = SubmitUnknown(job.id)
        own.__cause__ = failure.__cause__
        future.set_exception(own)
    elif failure is not None:
        future.set_exception(failure)
    elif position in receipt.refused:
        future.set_exception(receipt.refused[position])
    elif position in receipt.duplicates:
        first = split_job_id(receipt.duplicates[position])
        future.set_result(AsyncJobHandle(job._client, *first, created=False, tracked=job.tracked))
    else:
        future.set_result(job)
