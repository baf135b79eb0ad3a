"""The client for ordinary, blocking code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqe.client.core import Core, Progress
from tqe.client.handles import JobHandle, JobHandles
from tqe.client.packing import Receipt
from tqe.job import JobStatus, split_job_id
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store import producing, reading
from tqe.store.forecast import Forecast, forecast
from tqe.store.link import SyncLink
from tqe.store.steps import Steps
from tqe.telemetry.metrics import TaskSample

T = TypeVar("T")


class Client:
    """Submits jobs and reads what became of them. Threads may share one; it connects when it is first used.

    Types that `registry` does not know are submitted unchecked: they are tasks of another service.
    """

    def __init__(
        self, settings: Settings, *, registry: Registry | None = None, link: SyncLink | None = None
    ) -> None:
        self.core = Core(settings, registry, self._handles)
        self.link = link or SyncLink(settings)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.link.close()

    def run(self, steps: Steps[T]) -> T:
        """Carry out a procedure of the store."""
        return self.link.run(steps)

    def connect(self) -> None:
        """Connect now, to learn early of a server that is not there or not fit."""
        self.link.door()

    # -------------------------------------------------------------- submitting

    def submit(self, type_name: str, payload: Any, **options: Any) -> JobHandle:
        """One job. Options: priority, delay, run_at, timeout, max_retries, expires, idempotency_key,
        track."""
        item = self.core.item(type_name, payload, options)
        frame_id, index, created, tracked = self.run(self.core.submit(item))
        return JobHandle(self, frame_id, index, created=created, tracked=tracked)

    def submit_many(
        self,
        items: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> JobHandles:
        """Many jobs, `(type, payload)` or `(type, payload, options)`; the options here count for all of them.

        An item that is refused ends the submission, with PartialSubmit if jobs before it went in; `collect`
        goes on and reports it in `.refused`. `progress` is called with the number of items done.
        """
        steps = self.core.submit_mixed(items, options, collect=collect, progress=progress)
        return self._handles(self.run(steps))

    def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> JobHandles:
        """Many jobs of one type: several times faster than `submit_many`."""
        steps = self.core.submit_of(task, payloads, options, collect=collect, progress=progress)
        return self._handles(self.run(steps))

    def _handles(self, receipt: Receipt) -> JobHandles:
        return JobHandles(self, receipt)

    # -------------------------------------------------------------- one job

    def job(self, name: str) -> JobStatus:
        """What is known of a job. ValueError if the text is no job id."""
        return self.run(reading.job_record(self.core.keys, *split_job_id(name))).status

    def forecast(self, name: str) -> Forecast:
        """How long a job will run and wait, as far as anybody can say; see JobHandle.forecast."""
        return self.run(forecast(self.core.keys, self.core.settings.lanes, self.job(name)))

    def result(self, name: str, timeout: float | None = None) -> Any:
        """Wait for a job's result; see JobHandle.result."""
        return self.run(self.core.result(*split_job_id(name), timeout))

    def cancel(self, name: str) -> str:
        """Ask for a job not to run; see JobHandle.cancel."""
        return self.run(self.core.cancel(*split_job_id(name)))

    def handle(self, name: str) -> JobHandle:
        """A handle on a job that somebody else submitted."""
        return JobHandle(self, *split_job_id(name), created=False)

    # -------------------------------------------------------------- the queue

    def status(self) -> reading.QueueStatus:
        return self.run(reading.queue_status(self.core.keys, self.core.settings.lanes))

    def workers(self) -> list[reading.WorkerStatus]:
        return self.run(reading.workers(self.core.keys))

    def tasks(self) -> dict[str, TaskSample]:
        """What each task did so far on the hosts that live: outcomes, run times and waits."""
        return self.run(reading.tasks(self.core.keys))

    def pause(self, lane: str) -> None:
        """Workers take nothing from the lane until it is resumed."""
        self.run(producing.pause_lane(self.core.keys, self.core.lane(lane)))

    def resume(self, lane: str) -> None:
        self.run(producing.resume_lane(self.core.keys, self.core.lane(lane)))

    def purge_lane(self, lane: str) -> int:
        """Cancel all jobs that wait in the lane; how many there were."""
        return self.run(self.core.purge_lane(lane))

    # -------------------------------------------------------------- dead letters

    def dead_page(
        self,
        *,
        type_name: str | None = None,
        reason: str | None = None,
        cursor: reading.Cursor | None = None,
    ) -> reading.DeadPage:
        """A page of dead jobs, newest first."""
        steps = reading.dead_jobs(self.core.keys, type_name=type_name, reason=reason, cursor=cursor)
        return self.run(steps)

    def dead_jobs(
        self, *, type_name: str | None = None, reason: str | None = None
    ) -> Iterator[reading.DeadJob]:
        """All dead jobs that match, newest first, read page by page."""
        cursor = None
        while True:
            page = self.dead_page(type_name=type_name, reason=reason, cursor=cursor)
            yield from page.jobs
            cursor = page.cursor
            if cursor is None:
                return

    def dead_job(self, name: str) -> reading.DeadJob | None:
        """One dead job with its payload."""
        return self.run(reading.dead_job(self.core.keys, name))

    def replay(self, *names: str) -> producing.Replayed:
        """Run dead jobs again, from their first attempt."""
        return self.run(self.core.replay_these(names))

    def replay_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> producing.Replayed:
        return self.run(self.core.replay_all(type_name=type_name, reason=reason, progress=progress))

    def purge(self, *names: str) -> int:
        """Drop dead jobs for good; how many there were."""
        return self.run(self.core.purge_these(names))

    def purge_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> int:
        return self.run(self.core.purge_all(type_name=type_name, reason=reason, progress=progress))
