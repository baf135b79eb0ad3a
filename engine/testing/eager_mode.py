"""Owns eager mode: what is submitted runs at once in this process, by a worker's rules and without Redis."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from tqe import clock, codec, current
from tqe.app import App
from tqe.board import layout
from tqe.client import AsyncClient, AsyncJobHandle, AsyncJobHandles, Client, JobHandle, JobHandles
from tqe.client.core import Core, Progress, entry_of, read_result
from tqe.client.packing import Item, Parcel, Receipt, pack_one
from tqe.codec import payload as codec_payload
from tqe.errors import (
    EagerModeError,
    IdempotencyConflict,
    JobCancelled,
    PartialSubmit,
    SoftTimeLimit,
    SubmitError,
)
from tqe.job import (
    CANCELLED,
    COMPLETED,
    DEAD,
    QUEUED,
    JobStatus,
    Snapshot,
    job_id,
    job_status,
    split_job_id,
    types_run_length,
)
from tqe.registry import Task
from tqe.settings import Settings, override
from tqe.store.reading import JobRecord
from tqe.store.steps import Steps
from tqe.worker.failures import Failures, Outcome, RetryRule, rule_of
from tqe.worker.reporting import FailedAttempt
from tqe.worker.runner import NoLoop, told_of_result

T = TypeVar("T")
Entry = tuple[Any, Any, Mapping[str, Any]]  # type, payload, options

DEPTH_MAX: Final = 32  # jobs within jobs; each takes a good part of Python's stack

_STATES: Final = {layout.OUT_DONE: COMPLETED, layout.OUT_DEAD: DEAD, layout.OUT_CANCELLED: CANCELLED}
# What ends a job and not the test: Ctrl-C, and what pytest raises for `fail` and `skip`, go through.
_ENDS_A_JOB: Final = (Exception, SoftTimeLimit, JobCancelled, SystemExit, asyncio.CancelledError)

# The job whose code runs inline here, and how many are around it.
_running: Final[contextvars.ContextVar[current.CurrentJob | None]] = contextvars.ContextVar(
    "tqe_eager_job", default=None
)
_depth: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("tqe_eager_depth", default=0)


@contextlib.contextmanager
def eager(app: App, **settings: Any) -> Iterator[Eager]:
    """Inside of it every job that is submitted through `app` runs at once, and its handle knows how it ended.

    Arguments go through the real codec and its checks, failures through the task's own rules: it is retried
    without waiting, as often as a worker would. Further settings, `max_retries=0` for example, count
    meanwhile.
    """
    merged = override(app.settings, settings)
    ran = Eager(app, merged)
    before = current.set_look_up(lambda job: _running.get() if job is None else job)
    try:
        with app.replaced(merged, client=ran.client, async_client=ran.async_client):
            yield ran
    finally:
        current.set_look_up(before)


@dataclass(slots=True)
class _Job:
    """A job that runs."""

    id: str
    task: Task[..., Any]
    body: bytes
    lane: str
    timeout_s: float | None
    rule: RetryRule
    frame_id: bytes
    begun_ms: int
    failed: int = 0
    own: dict[str, Any] = field(default_factory=dict)

    def described(self) -> current.CurrentJob:
        return current.CurrentJob(
            id=self.id,
            type=self.task.name,
            lane=self.lane,
            attempt=self.failed + 1,
            crashes=0,
            token=f"{self.id}@eager",
        )


class Eager:
    """What ran in eager mode. `jobs` has them in the order in which they were submitted."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._failures = Failures(
            error_max_bytes=settings.error_max_bytes, grace_ms=0, now_ms=clock.wall_ms, known=()
        )
        self._records: dict[str, JobRecord] = {}
        self._held: dict[str, tuple[str, str]] = {}  # key as it is stored → job that holds it, its request
        self._lock = threading.Lock()

    @property
    def jobs(self) -> list[JobStatus]:
        """Each job as `handle.job()` tells it."""
        return [record.status for record in self._records.values()]

    def clear(self) -> None:
        """Forget the jobs and the idempotency keys."""
        self._records.clear()
        self._held.clear()

    # -------------------------------------------------------------- for the clients

    def client(self, settings: Settings, **_: Any) -> EagerClient:
        return EagerClient(self, settings, registry=self._app.registry)

    def async_client(self, settings: Settings, **_: Any) -> EagerAsyncClient:
        return EagerAsyncClient(self, settings, registry=self._app.registry)

    def record(self, name: str) -> JobRecord:
        found = self._records.get(name)
        if found is None:
            raise EagerModeError(f"job {name} did not run in this eager mode, so nothing is known of it")
        return found

    def submit(self, core: Core, item: Item, receipt: Receipt) -> tuple[bytes, int, bool]:
        """Run one job to its end; (frame id, index, created)."""
        parcel, job = self._begin(core, item, receipt)
        while job is not None and self._goes_on(job, *_inline(job)):
            pass
        return parcel

    async def asubmit(self, core: Core, item: Item, receipt: Receipt) -> tuple[bytes, int, bool]:
        parcel, job = self._begin(core, item, receipt)
        no_loop = NoLoop()
        while job is not None:
            if job.task.is_async:
                attempt = await _awaited(job)
            else:
                with no_loop:
                    attempt = _inline(job)
            if not self._goes_on(job, *attempt):
                break
        return parcel

    def items(self, core: Core, entries: Iterable[Entry], receipt: Receipt, collect: bool) -> Iterator[Item]:
        """The items of a bulk submission that are sound; the others go into the receipt, or are raised."""
        for position, (name, payload, options) in enumerate(entries):
            receipt.total = position + 1
            try:
                yield core.item(name, payload, options, position)
            except SubmitError as e:
                receipt.refused[position] = e
                if collect:
                    continue
                e.add_note(f"This is item {position} of the submission, counted from 0.")
                if receipt.accepted:
                    raise PartialSubmit(core.handles(receipt), e) from e
                raise

    # -------------------------------------------------------------- one job

    def _begin(self, core: Core, item: Item, receipt: Receipt) -> tuple[tuple[bytes, int, bool], _Job | None]:
        if self._app.registry.get(item.type) is None:
            known = ", ".join(sorted(self._app.registry.names)) or "none"
            raise EagerModeError(
                f"eager mode cannot run {item.type}: it is no task of this app, which has {known};"
                " a real queue (fixture tqe_queue) keeps it for another service"
            )
        if _depth.get() >= DEPTH_MAX:
            raise EagerModeError(
                f"jobs submit each other more than {DEPTH_MAX} deep: eager mode runs each within the one"
                " that submits it; a chain without an end needs a real queue (fixture tqe_queue)"
            )
        parcel = pack_one(item, core.make)
        frame = parcel.frame
        name = job_id(frame.frame_id, 0)
        with self._lock:
            held = self._held.get(frame.key.stored) if frame.key else None
            if held is None and frame.key is not None:
                self._held[frame.key.stored] = name, frame.key.request_hash
        if held is not None and frame.key is not None and held[1] != frame.key.request_hash:
            raise IdempotencyConflict(held[0])
        receipt.add(parcel, held)
        if held is not None:
            return (*split_job_id(held[0]), False), None
        return (frame.frame_id, 0, True), self._job(parcel, item, name)

    def _job(self, parcel: Parcel, item: Item, name: str) -> _Job:
        """The job as a worker finds it in the frame."""
        ((_, key, stored, _, zstd),) = codec.walk(parcel.frame.data)
        task = self._app.registry.lookup(key)
        assert task is not None
        options = item.options
        rule = rule_of(task, self._settings)
        if options.max_retries is not None:
            rule = RetryRule(options.max_retries, rule.base_ms, rule.cap_ms)
        timeout_ms = options.timeout_ms or task.timeout_ms
        job = _Job(
            id=name,
            task=task,
            body=codec_payload.decompress(stored) if zstd else stored,
            lane=options.lane,
            timeout_s=timeout_ms / 1000 if timeout_ms else None,
            rule=rule,
            frame_id=parcel.frame.frame_id,
            begun_ms=clock.wall_ms(),
        )
        self._keep(job, "")
        return job

    def _goes_on(self, job: _Job, result: Any, error: BaseException | None, in_arguments: bool) -> bool:
        """Note how an attempt ended; whether there is another one."""
        job.own["attempts"] = job.failed + 1
        if error is None:
            encoded, note = told_of_result(result, self._settings.result_max_bytes)
            if encoded:
                job.own["result"] = msgspec.json.decode(encoded)
            job.own.pop("error", None)
            if note:
                job.own["error"] = note
            self._keep(job, COMPLETED)
            return False
        judged = self._failures.judge(
            job.task, error, attempts=job.failed, unknowns=0, rule=job.rule, in_arguments=in_arguments
        )
        told = job.own["error"] = msgspec.json.decode(judged.error)
        if judged.status != layout.OUT_CANCELLED:
            self._tell_hooks(job, error, told, judged)
        if judged.status == layout.OUT_RETRY:
            job.failed += 1
            return True
        self._keep(job, _STATES[judged.status])
        return False

    def _tell_hooks(self, job: _Job, error: BaseException, told: dict[str, Any], judged: Outcome) -> None:
        """Here and now: an error hook that raises is a finding of the test."""
        failed = FailedAttempt(
            id=job.id,
            type=job.task.name,
            lane=job.lane,
            attempt=job.failed + 1,
            crashes=0,
            reason=told.get("reason", ""),
            message=told.get("message", ""),
            exception=error,
            will_retry=judged.status == layout.OUT_RETRY,
            retry_in_s=judged.delay_ms / 1000,
            _payload=lambda: codec_payload.decode(job.body),
        )
        for hook in self._app.error_hooks:
            hook(failed)

    def _keep(self, job: _Job, state: str) -> None:
        now_ms, types = clock.wall_ms(), types_run_length([job.task.name])
        snapshot = Snapshot(state or QUEUED, 1, 0, job.begun_ms, now_ms if state else 0, job.lane, types)
        status = job_status(
            job.frame_id,
            0,
            snapshot=snapshot,
            own=job.own,
            running_since_ms=None if state else job.begun_ms,
            cancel_requested=False,
            now_ms=now_ms,
        )
        self._records[job.id] = JobRecord(status, state or QUEUED, job.own)


# ------------------------------------------------------------------ one attempt

_Attempt = tuple[Any, BaseException | None, bool]  # result, error, whether the arguments raised it


def _inline(job: _Job) -> _Attempt:
    """An attempt here and now; a coroutine gets a loop of its own, in a thread if one runs here."""
    try:
        arguments = job.task.decoder.decode(job.body)
    except Exception as e:
        return None, e, True
    described = job.described()

    def call() -> Any:
        _depth.set(_depth.get() + 1)
        if job.task.is_async:
            return _finish(_limited(job, described, arguments))
        current.IN_CONTEXT.set(None)
        _running.set(described)
        return job.task.call_with(arguments)

    try:
        return contextvars.copy_context().run(call), None, False
    except EagerModeError:
        raise
    except _ENDS_A_JOB as e:
        return None, e, False


async def _awaited(job: _Job) -> _Attempt:
    """An attempt of an async task in the running loop."""
    try:
        arguments = job.task.decoder.decode(job.body)
    except Exception as e:
        return None, e, True
    attempt = asyncio.ensure_future(_limited(job, job.described(), arguments))
    try:
        return await attempt, None, False
    except EagerModeError:
        raise
    except _ENDS_A_JOB as e:
        ours = asyncio.current_task()
        if ours is not None and ours.cancelling():
            attempt.cancel()
            raise  # it is the test that is cancelled
        return None, e, False


async def _limited(job: _Job, described: current.CurrentJob, arguments: Any) -> Any:
    """The task's coroutine under its time limit, with the job as the current one."""
    _depth.set(_depth.get() + 1)
    current.IN_CONTEXT.set(described)
    try:
        async with asyncio.timeout(job.timeout_s) as limit:
            return await job.task.call_with(arguments)
    except TimeoutError as e:
        if limit.expired():
            raise SoftTimeLimit("it ran past its time limit") from e
        raise


def _finish(coroutine: Coroutine[Any, Any, T]) -> T:
    if asyncio._get_running_loop() is None:
        return asyncio.run(coroutine)
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="tqe-eager") as thread:
        return thread.submit(context.run, asyncio.run, coroutine).result()


# ------------------------------------------------------------------ clients


def _no_queue() -> EagerModeError:
    return EagerModeError(
        "eager mode has no queue: it knows the jobs that ran in it and nothing else;"
        " lanes, workers and dead letters need a real one (fixture tqe_queue)"
    )


class EagerClient(Client):
    """The sync client of eager mode."""

    def __init__(self, ran: Eager, settings: Settings, **options: Any) -> None:
        super().__init__(settings, **options)
        self._ran = ran

    def run(self, steps: Steps[T]) -> T:
        steps.close()
        raise _no_queue()

    def submit(self, type_name: str, payload: Any, **options: Any) -> JobHandle:
        item = self.core.item(type_name, payload, options)
        frame_id, index, created = self._ran.submit(self.core, item, Receipt())
        return JobHandle(self, frame_id, index, created=created, tracked=item.options.track)

    def submit_many(
        self, items: Iterable[Any], *, collect: bool = False, progress: Progress | None = None, **options: Any
    ) -> JobHandles:
        return self._many(_mixed(items, options), options, collect, progress)

    def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> JobHandles:
        return self._many(_alike(task, payloads, options), options, collect, progress)

    def _many(
        self,
        entries: Iterable[Entry],
        given: Mapping[str, Any],
        collect: bool,
        progress: Progress | None,
    ) -> JobHandles:
        receipt = Receipt(tracked=given.get("track") is not False)
        for item in self._ran.items(self.core, entries, receipt, collect):
            try:
                self._ran.submit(self.core, item, receipt)
            except IdempotencyConflict as e:
                _conflict(self.core, receipt, item, e, collect)
            if progress is not None:
                progress(receipt.accepted + len(receipt.refused))
        return JobHandles(self, receipt)

    def job(self, name: str) -> JobStatus:
        return self._ran.record(name).status

    def result(self, name: str, timeout: float | None = None) -> Any:
        return _result(self._ran.record(name))

    def cancel(self, name: str) -> str:
        return _cancel(self._ran.record(name))


class EagerAsyncClient(AsyncClient):
    """The async client of eager mode."""

    def __init__(self, ran: Eager, settings: Settings, **options: Any) -> None:
        super().__init__(settings, **options)
        self._ran = ran

    async def run(self, steps: Steps[T]) -> T:
        steps.close()
        raise _no_queue()

    async def submit(self, type_name: str, payload: Any, **options: Any) -> AsyncJobHandle:
        item = self.core.item(type_name, payload, options)
        frame_id, index, created = await self._ran.asubmit(self.core, item, Receipt())
        return AsyncJobHandle(self, frame_id, index, created=created, tracked=item.options.track)

    async def submit_many(
        self, items: Iterable[Any], *, collect: bool = False, progress: Progress | None = None, **options: Any
    ) -> AsyncJobHandles:
        return await self._many(_mixed(items, options), options, collect, progress)

    async def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> AsyncJobHandles:
        return await self._many(_alike(task, payloads, options), options, collect, progress)

    async def _many(
        self,
        entries: Iterable[Entry],
        given: Mapping[str, Any],
        collect: bool,
        progress: Progress | None,
    ) -> AsyncJobHandles:
        receipt = Receipt(tracked=given.get("track") is not False)
        for item in self._ran.items(self.core, entries, receipt, collect):
            try:
                await self._ran.asubmit(self.core, item, receipt)
            except IdempotencyConflict as e:
                _conflict(self.core, receipt, item, e, collect)
            if progress is not None:
                progress(receipt.accepted + len(receipt.refused))
        return AsyncJobHandles(self, receipt)

    async def job(self, name: str) -> JobStatus:
        return self._ran.record(name).status

    async def result(self, name: str, timeout: float | None = None) -> Any:
        return _result(self._ran.record(name))

    async def cancel(self, name: str) -> str:
        return _cancel(self._ran.record(name))


def _mixed(items: Iterable[Any], given: Mapping[str, Any]) -> Iterator[Entry]:
    for entry in items:
        name, payload, own = entry_of(entry)
        yield name, payload, {**given, **own}


def _alike(task: Task[..., Any] | str, payloads: Iterable[Any], given: Mapping[str, Any]) -> Iterator[Entry]:
    name = task if isinstance(task, str) else task.name
    for payload in payloads:
        payload, own = payload if isinstance(payload, tuple) else (payload, {})
        yield name, payload, {**given, **own}


def _conflict(core: Core, receipt: Receipt, item: Item, error: IdempotencyConflict, collect: bool) -> None:
    receipt.refused[item.position] = error
    if not collect:
        raise PartialSubmit(core.handles(receipt), error) if receipt.accepted else error


def _result(record: JobRecord) -> Any:
    if not record.status.ended:
        raise EagerModeError(
            f"job {record.status.id} waits for its own result, or for that of a job around it:"
            " it would wait for ever"
        )
    return read_result(record)


def _cancel(record: JobRecord) -> str:
    return "too_late" if record.status.ended else "requested"
