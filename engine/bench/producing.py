"""What producers of benchmarks do, each a function that is run in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any, Final

import uvloop

from tqe import clock
from tqe.app import App
from tqe.bench import tasks
from tqe.bench.lab import Produce
from tqe.client.packing import Parcel, Receipt, pack_alike

_TASK: Final = "NOOP"


class Stopwatch:
    """Wall and CPU time of the producing process, from the first submission to the last answer."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # payloads made beforehand are the caller's, and so is their collection
        self._cpu_ns = time.process_time_ns()
        self.at_ns = clock.monotonic_ns()

    def stop(self, jobs: int, **more: Any) -> dict[str, Any]:
        end_ns = clock.monotonic_ns()
        cpu_ns = time.process_time_ns() - self._cpu_ns
        return {"jobs": jobs, "begun_ns": self.at_ns, "ended_ns": end_ns, "cpu_ns": cpu_ns, **more}


def bulk(jobs: int, task: str = _TASK, **options: Any) -> Produce:
    """`submit_many` of one type."""

    def produce(app: App) -> Mapping[str, Any]:
        distinct = tasks.distinct_payloads()
        watch = Stopwatch()
        app.client.submit_alike(task_of(app, task), tasks.payloads(jobs, distinct), **options)
        return watch.stop(jobs, payload_bytes=_size(app, distinct[:1_000]))

    return produce


def bulk_of(jobs: int, task: str, payload: Mapping[str, Any], **options: Any) -> Produce:
    """`submit_many` of one type, with a number `n` in each payload beside what is given."""
    return numbered(task, [payload] * jobs, **options)


def numbered(task: str, payloads: Sequence[Mapping[str, Any]], **options: Any) -> Produce:
    """The same with a payload of its own for each job."""

    def produce(app: App) -> Mapping[str, Any]:
        watch = Stopwatch()
        found = ({"n": n, **payload} for n, payload in enumerate(payloads))
        app.client.submit_alike(task_of(app, task), found, **options)
        return watch.stop(len(payloads))

    return produce


def due_at(jobs: int, in_s: float) -> Produce:
    """Jobs that are all due at one moment; `due_wall_ms` in the answer."""

    def produce(app: App) -> Mapping[str, Any]:
        due_ms = clock.wall_ms() + round(in_s * 1000)
        left_ns = clock.monotonic_ns() + round(in_s * 1e9)
        found = bulk(jobs, run_at=datetime.fromtimestamp(due_ms / 1000, UTC))(app)
        return {**found, "due_ns": left_ns}

    return produce


def singles(jobs: int) -> Produce:
    """Frames of one, as single submissions make them, but sent a thousand a call: what is measured is their
    draining."""

    def produce(app: App) -> Mapping[str, Any]:
        core = app.client.core
        task, options = task_of(app, _TASK), core.options(task_of(app, _TASK), {})
        distinct = tasks.distinct_payloads()

        def parcels() -> Iterator[Parcel]:
            for at, payload in enumerate(tasks.payloads(jobs, distinct)):
                encoded = [core.encoder.encode(payload, task)]
                yield from pack_alike(_TASK, encoded, options, first=at, ids=core.ids, encoder=core.encoder)

        watch = Stopwatch()
        receipt = Receipt()
        for batch in core.calls(parcels()):
            app.client.run(core.send(batch, receipt))
        return watch.stop(receipt.created)

    return produce


def one_by_one(jobs: int, gap_s: float, *, first: int = 0, lane: str = "normal") -> Produce:
    """Single submissions of stamped jobs with pauses of random length around `gap_s`."""

    def produce(app: App) -> Mapping[str, Any]:
        watch = Stopwatch()
        for number in range(first, first + jobs):
            app.submit("STAMP", {"sent_ns": clock.monotonic_ns(), "n": number}, priority=lane)
            time.sleep(random.uniform(0.5, 1.5) * gap_s)
        return watch.stop(jobs)

    return produce


def concurrent(jobs: int, width: int) -> Produce:
    """`await submit()` from so many coroutines of one process at the same time."""

    async def submit_all(app: App) -> Mapping[str, Any]:
        client = app.async_client
        await client.connect()
        distinct = tasks.distinct_payloads()
        todo = tasks.payloads(jobs, distinct)

        async def submit_some() -> None:
            for payload in todo:  # one iterator for all of them
                await client.submit(_TASK, payload)

        watch = Stopwatch()
        await asyncio.gather(*(submit_some() for _ in range(width)))
        found = watch.stop(jobs)
        await app.aclose()
        return found

    def produce(app: App) -> Mapping[str, Any]:
        return uvloop.run(submit_all(app))

    return produce


def paced(rate: float, seconds: float, batch: int) -> Produce:
    """Batches at a fixed rate of jobs a second (0: as fast as it goes); one job of each batch is stamped.

    The due times are fixed beforehand: a late batch does not make the next ones later, so waiting that the
    load has caused is not left out of the latencies.
    """

    def produce(app: App) -> Mapping[str, Any]:
        distinct = tasks.distinct_payloads()[: 50 * batch]
        task = task_of(app, "PACED")
        batches = [distinct[at : at + batch] for at in range(0, len(distinct), batch)]
        begun_ns = clock.monotonic_ns()
        gap_ns = 1e9 * batch / rate if rate else 0.0
        watch = Stopwatch()
        sent = 0
        while clock.monotonic_ns() - begun_ns < seconds * 1e9:
            due_ns = begun_ns + round(sent * gap_ns)
            wait_ns = due_ns - clock.monotonic_ns()
            if gap_ns and wait_ns > 0:
                time.sleep(wait_ns / 1e9)
            payloads = list(batches[sent % len(batches)])
            at = random.randrange(batch)
            stamp_ns = due_ns if gap_ns else clock.monotonic_ns()
            payloads[at] = {"to": payloads[at]["to"], "n": sent, "sent_ns": stamp_ns}
            app.client.submit_alike(task, payloads)
            sent += 1
        return watch.stop(sent * batch, batches=sent)

    return produce


def floor(rounds: int = 5) -> Produce:
    """What no queue can be below: decode a payload and call the function, in a bare loop; `cpu_ns` a job."""

    def produce(app: App) -> Mapping[str, Any]:
        task = task_of(app, _TASK)
        encoder = app.client.core.encoder
        bodies = [encoder.encode(payload, task) for payload in tasks.distinct_payloads()]
        decode, f = task.decoder.decode, task.func
        gc.collect()
        gc.freeze()
        found = []
        for _ in range(rounds):
            begun_ns = time.process_time_ns()
            for body in bodies:
                s = decode(body)
                f(s.to, s.n)
            found.append((time.process_time_ns() - begun_ns) / len(bodies))
        return {"cpu_ns": median(found)}

    return produce


def task_of(app: App, name: str) -> Any:
    return app.registry.get(name)


def _size(app: App, payloads: Sequence[Mapping[str, Any]]) -> float:
    """Mean bytes of the encoded payloads."""
    encoder = app.client.core.encoder
    return sum(len(encoder.encode(payload, None)) for payload in payloads) / len(payloads)
