"""Owns one chaos run from start to verdict: a server, `tqe run`s, producers, and the checker's report."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.chaos.audit import read_store, read_sums
from tests.chaos.checker import History, Limits, MidAudit, Report, examine, history_of
from tests.chaos.journal import FaultLog, SubmitJournal, load
from tests.chaos.procs import TqeRun, processes_of, send
from tests.chaos.redisproc import RedisFaults
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe import App
from tqe.errors import PartialSubmit, RedisUnavailable, SubmitUnknown

PREFIX = "tq:{0}:"
LANES = ("high", "normal", "low")
# Faults come quickly one after another: a run's retries must not outlast it.
QUICK_RETRIES = {"TQE_BACKOFF_BASE_MS": "100", "TQE_BACKOFF_CAP_MS": "2000"}
RETRY_BASE_MS = 100

Payload = Mapping[str, Any]


class Producer:
    """Submits through the public API and journals what it was told, also when it was told nothing."""

    def __init__(self, journal: SubmitJournal, redis_url: str, rng: random.Random) -> None:
        self.journal = journal
        self.rng = rng
        self.app = App(redis_url=redis_url)
        self.first = self.number = 0
        self.unknown = 0

    @property
    def count(self) -> int:
        return self.number - self.first

    def bulk(
        self,
        type_: str,
        count: int,
        payload: Callable[[int], Payload] | None = None,
        *,
        expect: str = "ok",
        result: Callable[[int], Any] | None = None,
        journal_opts: Payload | None = None,
        **options: Any,
    ) -> None:
        """One `submit_many`; `payload(n)` gives what stands beside the job's number."""
        first, self.number = self.number, self.number + count
        numbers = range(first, first + count)
        known = dict(journal_opts or {})
        if result is None:
            self.journal.invoke_many(first, count, type_, expect, **known)
        else:
            for n in numbers:
                self.journal.invoke(n, type_, expect, result=result(n), **known)
        bodies = [(type_, {"n": n, **(payload(n) if payload else {})}) for n in numbers]
        try:
            handles = self.app.submit_many(bodies, **options)
        except PartialSubmit as partial:
            self.told(first, partial.handles)
            self.lost(first + len(partial.handles), count - len(partial.handles), partial.cause)
        except RedisUnavailable as error:
            self.lost(first, count, error)
        else:
            assert len(handles) == count
            self.told(first, handles)

    def told(self, first: int, handles: Sequence[Any]) -> None:
        self.journal.ok_many(first, [handle.id for handle in handles])

    def lost(self, first: int, count: int, error: BaseException | None) -> None:
        """Not answered. Even a surely refused part is journalled as unknown: 0 or 1 job, never 2."""
        assert isinstance(error, RedisUnavailable | SubmitUnknown), error
        self.unknown += count
        self.journal.unknown_many(first, count)

    def single(self, type_: str, payload: Payload, *, expect: str = "ok", **options: Any) -> Any:
        n, self.number = self.number, self.number + 1
        self.journal.invoke(n, type_, expect, key=options.get("idempotency_key", ""))
        try:
            handle = self.app.submit(type_, {"n": n, **payload}, **options)
        except (RedisUnavailable, SubmitUnknown) as error:
            self.lost(n, 1, error)
            return None
        (self.journal.ok if handle.created else self.journal.dup)(n, handle.id)
        return handle

    def mixed(self, jobs: int, pause_s: float = 0.0) -> None:
        """Sync jobs of 0 to 2 ms, some with results, some that fail first; frames of 1 to 200."""
        rng, left = self.rng, jobs
        while left > 0:
            count = min(left, rng.choice((1, 1, 10, 50, 200)))
            left -= count
            kind = rng.random()
            if kind < 0.7:
                self.bulk("QUICK", count, lambda n: {"us": rng.randrange(2000)})
            elif kind < 0.9:
                self.bulk("RESULT", count, lambda n: {"us": rng.randrange(500)}, result=lambda n: [n, n * n])
            else:
                failures = rng.randrange(1, 3)
                few = min(count, 10)
                left += count - few
                self.bulk("FLAKY", few, lambda n, f=failures: {"failures": f}, expect=f"fail:{failures}")  # type: ignore[misc]
            if pause_s:
                time.sleep(pause_s)

    def close(self) -> None:
        self.app.close()


class Arena:
    """Everything of one run lies in one folder; `finish` ends it and judges it."""

    def __init__(self, server: RedisServer, folder: Path, seed: int, redis_url: str = "") -> None:
        self.server = server
        self.folder = folder
        self.seed = seed
        self.redis_url = redis_url or server.url
        self.rng = random.Random(seed)
        self.faults = FaultLog(folder)
        self.redis_faults = RedisFaults(server, self.faults)
        self.submits = SubmitJournal(folder)
        self.runs: list[TqeRun] = []
        self.producers: list[Producer] = []
        self.mid_audits: list[MidAudit] = []
        self.direct: Any = server.client()

    # ---- who takes part

    def run(self, **options: Any) -> TqeRun:
        """A started `tqe run`."""
        options["env"] = {**QUICK_RETRIES, **options.get("env", {})}
        run = TqeRun(self.redis_url, self.folder, self.faults, **options)
        self.runs.append(run)
        return run.start()

    def producer(self) -> Producer:
        made = Producer(self.submits, self.redis_url, random.Random(self.rng.random()))
        made.first = made.number = 10_000_000 * len(self.producers)
        self.producers.append(made)
        return made

    @contextlib.contextmanager
    def load(self, jobs: int, *, backlog: int = 2_000, pause_s: float = 0.0) -> Iterator[Producer]:
        """Mixed jobs while the block does its faults: `jobs` at least, and until the block has ended.

        So every fault meets a queue at work, and one that is over never waits for a long backlog.
        """
        producer, enough = self.producer(), threading.Event()
        failed: list[BaseException] = []

        def body() -> None:
            try:
                while producer.count < jobs or not enough.is_set():
                    if producer.count - self.ended_jobs() > backlog:
                        time.sleep(0.005)
                    else:
                        producer.mixed(200, pause_s)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body, name="chaos-producer", daemon=True)
        thread.start()
        try:
            yield producer
        finally:
            enough.set()
            thread.join(60 + jobs / 200)
        assert not thread.is_alive(), "the producer never came to its end"
        if failed:
            raise failed[0]

    @contextlib.contextmanager
    def auditing(self, every_s: float = 0.2) -> Iterator[None]:
        """Conservation sums, sampled while the block runs."""
        stop = threading.Event()

        def body() -> None:
            with contextlib.closing(self.server.client()) as client:
                while not stop.wait(every_s):
                    with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                        self.mid_audits.append(read_sums(client))

        thread = threading.Thread(target=body, name="chaos-audit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)

    # ---- what can be seen from outside

    def jobs_left(self) -> int:
        """Frames anywhere on their way; -1 while Redis cannot be asked."""
        try:
            pipe = self.direct.pipeline(transaction=True)
            for lane in LANES:
                pipe.llen(f"{PREFIX}queue:{lane}")
                pipe.zcard(f"{PREFIX}sorted:{lane}")
            pipe.zcard(f"{PREFIX}delayed")
            hashes = list(self.direct.scan_iter(match=f"{PREFIX}processing:*", count=1000))
            for name in hashes:
                pipe.hlen(name)
            return int(sum(pipe.execute()))
        except (redis.ConnectionError, redis.TimeoutError):
            return -1

    def total(self, name: str) -> int:
        return self.totals().get(name, 0)

    def totals(self) -> dict[str, int]:
        """Of the stats hash; asked again while Redis is away."""

        def ask() -> list[dict[bytes, bytes]]:
            try:
                return [self.direct.hgetall(f"{PREFIX}stats")]
            except (redis.ConnectionError, redis.TimeoutError):
                return []

        found = wait_until(ask, 60, "Redis answers")[0]
        return {name.decode(): int(value) for name, value in found.items()}

    def ended_jobs(self) -> int:
        totals = self.totals()
        return sum(totals.get(name, 0) for name in ("completed", "dead", "cancelled"))

    def wait_drained(self, timeout: float = 60.0) -> None:
        """Nothing waits, is delayed or is leased any more, seen twice with a fetch in between."""
        seen = 0

        def quiet() -> bool:
            nonlocal seen
            seen = seen + 1 if self.jobs_left() == 0 else 0
            return seen >= 3

        try:
            wait_until(quiet, timeout, "every job has ended")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.evidence()}") from None

    # ---- the end

    def finish(self, limits: Limits | None = None, *, exit_code: int = 0) -> Report:
        """Stop what runs, read the store, judge. Raises with everything that helps to understand."""
        codes = [(run, run.stop()) for run in self.runs if run.running]
        history, report = self.judge(limits or Limits())
        wrong = [f"`tqe run` {run.pid} ended with {code}" for run, code in codes if code != exit_code]
        if report.violations or wrong:
            raise AssertionError(
                "\n".join([*wrong, str(report), self.stories(history, report), self.evidence()])
            )
        return report

    def judge(self, limits: Limits) -> tuple[History, Report]:
        with contextlib.closing(self.server.client()) as client:
            audit = read_store(client)
        audit.residue += [f"process {pid} is still there" for pid in self.left_behind()]
        journals = load(self.folder)
        history = history_of(journals, audit, self.mid_audits)
        report = examine(history, limits)
        print(f"seed {self.seed}: {report}")
        return history, report

    def left_behind(self) -> list[int]:
        """Processes of our runs that live although their supervisors have ended."""
        return [] if any(run.running for run in self.runs) else processes_of(self.folder)

    def evidence(self) -> str:
        logs = [f"--- {run.log.name}\n{run.text()[-3000:]}" for run in self.runs]
        return "\n".join([f"replay with TQE_TEST_SEED={self.seed}", f"folder {self.folder}", *logs])

    def stories(self, history: History, report: Report) -> str:
        """What is known of the first jobs that something is wrong with."""
        lines: list[str] = []
        subjects = [violation.subject for violation in report.violations if "." in violation.subject]
        for job in list(dict.fromkeys(subjects))[:3]:
            lines.append(
                f"--- {job}: snapshot {history.audit.states.get(job)}, dlq {history.audit.dlq.get(job)}"
            )
            lines += [f"    {sub}" for sub in history.submissions if sub.id == job]
            runs = [run for run in history.executions if run.job == job]
            lines += [f"    {run}" for run in runs]
            pids = {run.pid for run in runs}
            lines += [f"    {fault}" for fault in history.faults if pids & set(fault.pids) or not fault.pids]
        return "\n".join(lines[:60])

    def close(self) -> None:
        for run in self.runs:
            run.close()
        for pid in processes_of(self.folder):  # orphans: nobody else knows them any more
            send(pid, signal.SIGKILL)
        for producer in self.producers:
            producer.close()
        self.direct.close()
