"""One worker from submission to result: tasks of every kind, failures, limits, cancels, odd results."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe import Reject, Retry, SoftTimeLimit, current_job
from tqe.board import layout
from tqe.errors import JobFailed, JobWasCancelled, ResultTooLarge


class Point(msgspec.Struct):
    x: int
    y: int = 2


def finish(rig: Rig) -> None:
    """Drain every worker and look into the books."""
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


# ------------------------------------------------------------------ kinds of tasks


def test_sync_async_struct_and_keyword_tasks_answer(rig: Rig) -> None:
    app = rig.app

    @app.task("ADD")
    def add(a: int, b: int = 10) -> int:
        return a + b

    @app.task("AADD")
    async def aadd(a: int, *, b: int = 10) -> int:
        await asyncio.sleep(0.01)
        return a + b

    @app.task("POINT")
    def point(p: Point) -> list[int]:
        return [p.x, p.y]

    @app.task("KW")
    def kw(**given: Any) -> dict[str, Any]:
        return given

    @app.task("AKW")
    async def akw(**given: Any) -> int:
        return len(given)

    @app.task("NOTHING")
    def nothing() -> None: ...

    rig.worker()
    answers = {
        rig.submit("ADD", {"a": 1}): 11,
        rig.submit("AADD", {"a": 1, "b": 2}): 3,
        rig.submit("POINT", {"x": 1}): [1, 2],
        rig.submit("KW", {"q": [1, {"z": None}]}): {"q": [1, {"z": None}]},
        rig.submit("AKW", {"q": 1, "r": 2}): 2,
        rig.submit("NOTHING"): None,
    }
    for handle, answer in answers.items():
        assert handle.result(timeout=5) == answer
    finish(rig)


def test_a_job_knows_itself(rig: Rig) -> None:
    def about(n: int) -> list[Any]:
        job = current_job()
        if job.attempt == 1:
            raise Retry(delay=0)
        return [job.id, job.type, job.lane, job.attempt, job.crashes, job.token]

    async def about_async(n: int) -> list[Any]:
        await asyncio.sleep(0)
        return about(n)

    rig.app.task("ABOUT")(about)
    rig.app.task("AABOUT")(about_async)
    rig.steward()
    worker = rig.worker()
    for kind in ("ABOUT", "AABOUT"):
        handle = rig.submit(kind, {"n": 1}, priority="high")
        job, name, lane, attempt, crashes, token = handle.result(timeout=5)
        assert (job, name, lane, attempt, crashes) == (handle.id, kind, "high", 2, 0)
        assert token == f"{handle.id[:26]}.000.0001.00001@{worker.incarnation}"
    finish(rig)


def test_jobs_of_one_frame_have_their_own_ends(rig: Rig) -> None:
    """Results, failures and dead letters of one frame, in one settle and in many."""

    @rig.app.task("MIXED", max_retries=1)
    def mixed(n: int) -> int | None:
        rig.journal("ran", n)
        match n % 5:
            case 0:
                return None
            case 1:
                return n
            case 2:
                raise Reject(f"no {n}")
            case 3 if current_job().attempt == 1:
                raise ValueError(n)
            case 4:
                raise KeyError(n)
        return -n

    rig.steward()
    rig.worker()
    handles = rig.frame("MIXED", [{"n": n} for n in range(500)])
    rig.wait_ended()
    finish(rig)
    ran = rig.journal.count("ran")
    for n, handle in enumerate(handles):
        status = handle.job()
        assert ran[n] == (2 if n % 5 > 2 else 1), n
        assert status.attempts == ran[n], n
        if n % 5 in (0, 1, 3):
            assert handle.result(timeout=1) == {0: None, 1: n, 3: -n}[n % 5]
        else:
            assert (status.status, rig.told(handle)["error"]["reason"]) == (
                "dead",
                "rejected" if n % 5 == 2 else "failed",
            )
    assert rig.stats() | {"fenced": 0} == {
        "submitted": 500, "completed": 300, "dead": 200, "failed": 400, "retried": 200, "fenced": 0,
    }  # fmt: skip


def test_untracked_jobs_leave_nothing_behind(rig: Rig) -> None:
    @rig.app.task("QUIET")
    def quiet(n: int) -> int:
        rig.journal("ran", n)
        return n

    @rig.app.task("AQUIET")
    async def aquiet(n: int) -> int:
        rig.journal("ran", n)
        return n

    rig.worker()
    handles = rig.frame("QUIET", [{"n": n} for n in range(100)], track=False)
    rig.frame("AQUIET", [{"n": n} for n in range(100, 200)], track=False)
    rig.submit("QUIET", {"n": 200}, track=False)
    assert rig.wait_ended() == {"submitted": 201, "completed": 201}
    assert set(rig.journal.count("ran").items()) == {(n, 1) for n in range(201)}
    finish(rig)
    assert handles[0].status() == "untracked" and rig.redis.keys("tq:{0}:job:*") == []


def test_payloads_are_decompressed(rig: Rig) -> None:
    def size(text: str) -> int:
        return len(text)

    async def asize(text: str) -> int:
        return len(text)

    rig.app.task("SIZE")(size)
    rig.app.task("ASIZE")(asize)
    rig.worker()
    for kind in ("SIZE", "ASIZE"):
        assert rig.submit(kind, {"text": "x" * 900_000}).result(timeout=5) == 900_000
        handles = rig.frame(kind, [{"text": "y" * size} for size in (1, 2_000, 100_000)])
        assert [handle.result(timeout=5) for handle in handles] == [1, 2_000, 100_000]
    finish(rig)


# ------------------------------------------------------------------ results


def test_odd_results_complete_and_say_what_is_missing(rig: Rig) -> None:
    def big(size: int) -> str:
        return "x" * size

    def strange() -> object:
        return object()

    async def abig(size: int) -> str:
        return "x" * size

    async def astrange() -> object:
        return {1: {2, 3}, 2: object()}

    for name, func in (("BIG", big), ("ABIG", abig), ("STRANGE", strange), ("ASTRANGE", astrange)):
        rig.app.task(name)(func)
    rig.worker()
    for kind in ("BIG", "ABIG"):
        assert rig.submit(kind, {"size": 65_534}).result(timeout=5) == "x" * 65_534
        with pytest.raises(ResultTooLarge):
            rig.submit(kind, {"size": 65_535}).result(timeout=5)
    for kind in ("STRANGE", "ASTRANGE"):
        handle = rig.submit(kind)
        assert handle.result(timeout=5) is None
        assert "not JSON" in rig.told(handle)["error"]["message"]
    finish(rig)


def test_results_larger_than_the_outcome_area_flow_through_it(rig: Rig) -> None:
    """600 results of 60 KB: 36 MB through two halves of 512 KiB."""

    def big(n: int) -> str:
        rig.journal("ran", n)
        return f"{n}:" + "x" * 60_000

    async def abig(n: int) -> str:
        return big(n)

    rig.app.task("BIG")(big)
    rig.app.task("ABIG")(abig)
    worker = rig.worker()
    handles = [*rig.frame("BIG", [{"n": n} for n in range(300)])]
    handles += [*rig.frame("ABIG", [{"n": n} for n in range(300, 600)])]
    rig.wait_ended()
    assert [len(handle.result(timeout=1).partition(":")[2]) for handle in handles] == [60_000] * 600
    assert set(rig.journal.count("ran").values()) == {1}
    finish(rig)
    assert worker.counter("takeovers") == 1


# ------------------------------------------------------------------ failures


def test_retries_back_off_and_end_in_the_dead_letter_queue(rig: Rig) -> None:
    def doomed(n: int) -> None:
        rig.journal("ran", n)
        raise ValueError(f"attempt {current_job().attempt}")

    async def adoomed(n: int) -> None:
        doomed(n)

    rig.app.task("DOOMED", max_retries=3, backoff=0.04)(doomed)
    rig.app.task("ADOOMED", max_retries=3, backoff=0.04)(adoomed)
    rig.steward()
    rig.worker()
    handles = [rig.submit(kind, {"n": n}) for n, kind in enumerate(("DOOMED", "ADOOMED"))]
    for n, handle in enumerate(handles):
        with pytest.raises(JobFailed, match="attempt 4"):
            handle.result(timeout=10)
        at = [note.at_ns for note in rig.journal.notes("ran") if note.words[1] == n]
        gaps_ms = [(b - a) / 1e6 for a, b in itertools.pairwise(at)]
        # Half fixed, half random: 20 to 40 ms, then 40 to 80, 80 to 160, and whatever it takes to notice.
        assert len(gaps_ms) == 3 and all(g >= low for g, low in zip(gaps_ms, (20, 40, 80), strict=True))
        error = rig.told(handle)["error"]
        assert (error["reason"], error["type"]) == ("failed", "ValueError")
        assert "doomed" in error["traceback"] and "test_worker.py:" in error["where"]
        dead = rig.client.dead_job(handle.id)
        assert dead is not None and (dead.reason, dead.attempts) == ("failed", 4)
    finish(rig)


def test_what_a_task_says_about_its_failure_is_heeded(rig: Rig) -> None:
    class Fatal(Exception): ...

    def picky(what: str) -> str:
        attempt = current_job().attempt
        rig.journal("ran", what, current_job().type)
        if attempt == 2:
            return f"after {what}"
        match what:
            case "retry":
                raise Retry("later", delay=0.3)
            case "reject":
                raise Reject("never")
            case "fatal":
                raise Fatal(what)
            case "unlisted":
                raise KeyError(what)
            case "exit":
                sys.exit(3)
            case "keyboard":
                raise KeyboardInterrupt
            case "cancelled":
                raise asyncio.CancelledError
            case "stop":
                raise StopIteration
        raise OSError(what)

    async def apicky(what: str) -> str:
        await asyncio.sleep(0)
        return picky(what)

    for name, func in (("PICKY", picky), ("APICKY", apicky)):
        rig.app.task(name, retry_on=(OSError, Fatal, RuntimeError, StopIteration), no_retry_on=(Fatal,))(func)
    rig.steward()
    worker = rig.worker()
    for kind in ("PICKY", "APICKY"):
        names = ("retry", "reject", "fatal", "unlisted", "exit", "keyboard", "cancelled", "stop", "other")
        handles = {what: rig.submit(kind, {"what": what}) for what in names}
        for what in ("reject", "fatal", "unlisted"):
            with pytest.raises(JobFailed):
                handles[what].result(timeout=5)
        for what in ("retry", "exit", "keyboard", "cancelled", "stop", "other"):
            assert handles[what].result(timeout=5) == f"after {what}", (kind, what)
        assert rig.told(handles["reject"])["error"] | {"where": ""} == {
            "reason": "rejected", "type": "Reject", "message": "never", "where": "",
        }  # fmt: skip
        first, second = (note.at_ns for note in rig.journal.notes("ran") if note.words[1:] == ("retry", kind))
        assert second - first >= 0.3e9
    assert worker.running
    finish(rig)


def test_an_error_that_cannot_be_told_is_still_one(rig: Rig) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @rig.app.task("MUTE", max_retries=0)
    def mute() -> None:
        raise Mute

    @rig.app.task("LOUD", max_retries=0)
    def loud() -> None:
        raise ValueError("\udcff" + "ä" * 50_000)

    rig.worker()
    handles = [rig.submit("MUTE"), rig.submit("LOUD")]
    rig.wait_ended()
    assert "RuntimeError" in rig.told(handles[0])["error"]["message"]
    assert "[cut]" in rig.told(handles[1])["error"]["message"]
    assert len(msgspec.json.encode(rig.told(handles[1])["error"])) <= rig.settings.error_max_bytes + 300
    finish(rig)


def test_arguments_that_do_not_fit(rig: Rig) -> None:
    """A wrong type will never fit; an unknown or missing argument may be of another version of the app."""

    def strict(a: int) -> int:
        return a

    async def astrict(a: int) -> int:
        return a

    rig.app.task("STRICT")(strict)
    rig.app.task("ASTRICT")(astrict)
    rig.worker()
    for kind in ("STRICT", "ASTRICT"):
        wrong, unknown = rig.submit(kind, {"a": "1"}), rig.submit(kind, {"a": 1, "b": 2})
        missing = rig.submit(kind, {})
        with pytest.raises(JobFailed, match="argument a is wrong"):
            wrong.result(timeout=5)
        assert rig.told(wrong)["error"]["reason"] == "arguments"
        for handle, text in ((unknown, "no argument b"), (missing, "argument a is missing")):
            wait_until(lambda handle=handle: handle.status() == "retrying", 5)
            assert text in rig.told(handle)["error"]["message"] and handle.job().attempts == 0
    delayed = rig.redis.zrange(rig.keys.delayed, 0, -1, withscores=True)
    now_s = rig.redis.time()[0]
    assert [int(frame[61:64]) for frame, _ in delayed] == [1] * 4
    assert all(27 <= due / 1000 - now_s <= 31 for _, due in delayed)
    finish(rig)


def test_an_unknown_type_is_redelivered_until_its_grace_ends(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(unknown_type_grace_s=1)

    @rig.app.task("KNOWN")
    def known() -> None: ...

    rig.steward()
    rig.worker()
    handle = rig.submit("UNHEARD", {"a": 1})
    wait_until(lambda: handle.status() == "retrying", 5)
    assert rig.told(handle)["error"]["reason"] == "unknown_type"
    with pytest.raises(JobFailed, match=r"no task 'UNHEARD' is registered here; this worker knows: KNOWN"):
        handle.result(timeout=5)
    assert rig.client.dead_job(handle.id).attempts <= 1  # type: ignore[union-attr]
    finish(rig)


def test_an_unknown_type_waits_for_a_worker_that_knows_it(rig_of: Callable[..., Rig]) -> None:
    """The rolling deploy: old workers pass on what only new ones can run."""
    rig = rig_of(unknown_type_grace_s=1)
    rig.steward()
    old = rig.worker()
    handles = rig.frame("INVOICE", [{"n": n} for n in range(20)])
    wait_until(lambda: handles[19].status() == "retrying", 5)

    @rig.app.task("INVOICE")
    def invoice(n: int) -> int:
        return n

    rig.worker()
    assert old.drain() == 0
    assert [handle.result(timeout=5) for handle in handles] == list(range(20))
    assert {handle.job().attempts for handle in handles} == {1}
    finish(rig)


# ------------------------------------------------------------------ limits


def test_options_of_a_job_and_of_a_frame_beat_those_of_the_task(rig: Rig) -> None:
    def fails(n: int) -> None:
        rig.journal("ran", n)
        raise ValueError(n)

    async def afails(n: int) -> None:
        fails(n)

    rig.app.task("FAILS", max_retries=0)(fails)
    rig.app.task("AFAILS", max_retries=0)(afails)
    rig.steward()
    rig.worker()
    base = 0
    for kind in ("FAILS", "AFAILS"):
        rig.frame(kind, [{"n": base + n} for n in range(3)], max_retries=2)
        items = [(kind, {"n": base + 3 + n}, {"max_retries": n}) for n in range(3)]
        rig.ids += [handle.id for handle in rig.client.submit_many(items)]
        rig.submit(kind, {"n": base + 6})
        base += 7
    rig.wait_ended()
    ran = rig.journal.count("ran")
    assert [ran[n] for n in range(14)] == [3, 3, 3, 1, 2, 3, 1] * 2
    finish(rig)


def test_options_of_later_frames_of_one_fetch_are_heeded(rig: Rig) -> None:
    """Once every type is known to be short, frames are taken in without a look into each: but their options
    count."""

    @rig.app.task("QUICK")
    def quick(n: int) -> None:
        rig.journal("ran", n)
        if n == -1:
            raise ValueError(n)

    rig.worker()
    for _ in range(3):  # one frame after another, so that the worker measures
        rig.frame("QUICK", [{"n": 0} for _ in range(400)])
        rig.wait_ended()
    rig.client.pause("normal")
    rig.submit("QUICK", {"n": 1})
    dead = rig.submit("QUICK", {"n": -1}, max_retries=0)
    expired = rig.submit("QUICK", {"n": 2}, expires=0.05)
    gone = time.monotonic() + 0.06
    wait_until(lambda: time.monotonic() > gone)
    rig.client.resume("normal")
    with pytest.raises(JobFailed):
        dead.result(timeout=5)
    with pytest.raises(JobWasCancelled):
        expired.result(timeout=5)
    rig.wait_ended()
    finish(rig)
    assert rig.journal.count("ran")[2] == 0 and rig.journal.count("ran")[-1] == 1


def test_jobs_that_expired_are_not_run(rig: Rig) -> None:
    def late(n: int) -> None:
        rig.journal("ran", n)

    async def alate(n: int) -> None:
        late(n)

    rig.app.task("LATE")(late)
    rig.app.task("ALATE")(alate)
    kept = rig.submit("LATE", {"n": 0}, expires=60)
    gone = [rig.submit("LATE", {"n": 1}, expires=0.05), rig.submit("ALATE", {"n": 2}, expires=0.05)]
    gone += rig.frame("ALATE", [{"n": 3}] * 50, expires=0.05)
    until = time.monotonic() + 0.06
    wait_until(lambda: time.monotonic() > until)
    rig.worker()
    assert kept.result(timeout=5) is None
    for handle in gone:
        with pytest.raises(JobWasCancelled, match="expired"):
            handle.result(timeout=5)
    rig.wait_ended()
    assert rig.journal.count("ran") == {0: 1}
    assert rig.stats() == {"submitted": 53, "completed": 1, "expired": 52}
    finish(rig)


def test_coroutines_past_their_timeout_fail(rig: Rig) -> None:
    @rig.app.task("SLEEP", timeout=0.1, max_retries=0)
    async def sleep(s: float) -> str:
        try:
            await asyncio.sleep(s)
        finally:
            rig.journal("cleaned up", s)
        return "done"

    @rig.app.task("STUBBORN", timeout=0.1, max_retries=0)
    async def stubborn() -> str:
        while True:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                rig.journal("refused", 1)
                if len(rig.journal.notes("refused")) == 2:
                    return "gave in"

    @rig.app.task("INNER", timeout=5)
    async def inner() -> str:
        try:
            async with asyncio.timeout(0.02):
                await asyncio.sleep(30)
        except TimeoutError:
            return "its own timeout"
        return "?"

    rig.worker()
    late, good, own = rig.submit("SLEEP", {"s": 30}), rig.submit("SLEEP", {"s": 0}), rig.submit("INNER")
    longer = rig.submit("SLEEP", {"s": 0.2}, timeout=5)
    stuck = rig.submit("STUBBORN")
    with pytest.raises(JobFailed, match="past its time limit"):
        late.result(timeout=5)
    assert (
        rig.told(late)["error"]["reason"] == "timeout" and rig.told(late)["error"]["type"] == "SoftTimeLimit"
    )
    assert (good.result(5), own.result(5), longer.result(5)) == ("done", "its own timeout", "done")
    assert stuck.result(5) == "gave in"  # asked again after a second
    assert rig.journal.count("cleaned up") == {30: 1, 0: 1, 0.2: 1}
    finish(rig)


def test_a_condemned_job_is_interrupted(rig: Rig) -> None:
    """The supervisor's signal raises in the job that it names, as often as it takes, and in no other."""

    @rig.app.task("SPIN", timeout=1, max_retries=0)
    def spin(n: int) -> str:
        rig.journal("began", n)
        try:
            while True:
                time.sleep(0.001)
        except SoftTimeLimit:
            rig.journal("interrupted", n)
            if n == 2:
                return "cleaned up"
            raise

    @rig.app.task("ASPIN", timeout=1, max_retries=0)
    async def aspin(n: int) -> None:
        rig.journal("began", n)
        while True:
            time.sleep(0.001)

    worker = rig.worker()
    for n, kind in ((1, "SPIN"), (2, "SPIN"), (3, "ASPIN")):
        handle = rig.submit(kind, {"n": n})
        wait_until(lambda n=n: rig.journal.count("began")[n], 5)
        assert worker.view.get(layout.C_TIMEOUT_MS) == 1_000
        step = worker.view.get(layout.C_IN_USER)
        worker.condemn(step=step - 1)  # meant for a job that is over
        worker.condemn(step=step + 1)
        assert handle.status() == "queued" or handle.status() == "running"
        assert rig.journal.count("interrupted")[n] == 0
        worker.condemn(step=step)
        if n == 2:
            assert handle.result(timeout=5) == "cleaned up"
        else:
            with pytest.raises(JobFailed, match="past its time limit"):
                handle.result(timeout=5)
            assert rig.told(handle)["error"]["reason"] == "timeout"
    worker.condemn(step=0)
    finish(rig)


def test_a_signal_between_jobs_hits_nobody(rig: Rig) -> None:
    """Signals that come when the job that they name is over, some in the middle of another."""

    @rig.app.task("TINY")
    def tiny(n: int) -> None:
        sum(range(1_000))

    worker = rig.worker()
    sent = jobs = last = 0
    while sent < 200:
        rig.frame("TINY", [{"n": n} for n in range(1_000)])
        jobs += 1_000
        while (step := worker.view.get(layout.C_STEP)) < jobs:
            if step > max(last, 1):
                worker.condemn(step=step - 1)
                sent += 1
            last = step
    assert rig.wait_ended() == {"submitted": jobs, "completed": jobs}
    finish(rig)


# ------------------------------------------------------------------ cancelling


def test_a_job_is_cancelled_before_it_starts(rig: Rig) -> None:
    def never(n: int) -> None:
        rig.journal("ran", n)

    async def anever(n: int) -> None:
        never(n)

    rig.app.task("NEVER")(never)
    rig.app.task("ANEVER")(anever)
    frames = [rig.frame("NEVER", [{"n": n} for n in range(100)])]
    frames += [rig.frame("ANEVER", [{"n": 100 + n} for n in range(100)])]
    one, delayed = rig.submit("NEVER", {"n": 200}), rig.submit("NEVER", {"n": 201}, delay=3600)
    gone = [handles[n] for handles in frames for n in (0, 7, 8, 99)] + [one]
    assert {handle.cancel() for handle in gone} == {"requested"}
    assert delayed.cancel() == "cancelled"
    rig.worker()
    for handle in [*gone, delayed]:
        with pytest.raises(JobWasCancelled):
            handle.result(timeout=5)
    stats = rig.wait_ended()
    assert (stats["completed"], stats["cancelled"]) == (192, 10)
    assert set(rig.journal.count("ran").items()) == {
        (n, 1) for n in range(200) if n % 100 not in (0, 7, 8, 99)
    }
    rig.redis.delete(rig.keys.cancel)  # the steward sweeps it
    finish(rig)


def test_a_job_is_cancelled_while_it_runs(rig: Rig) -> None:
    @rig.app.task("BLOCK")
    def block(n: int) -> None:
        rig.journal("began", n)
        while True:
            time.sleep(0.001)

    @rig.app.task("ABLOCK")
    async def ablock(n: int) -> None:
        rig.journal("began", n)
        await asyncio.sleep(60)

    rig.steward()
    worker = rig.worker()
    alone = rig.submit("BLOCK", {"n": 0})
    wait_until(lambda: rig.journal.count("began")[0], 5)
    assert alone.cancel() == "requested"
    wait_until(lambda: worker.view.get(layout.C_CANCEL_STEP), 5)
    worker.condemn(layout.CONDEMN_CANCEL)
    with pytest.raises(JobWasCancelled):
        alone.result(timeout=5)
    # Beside each other: two coroutines and a sync job on the helper thread.
    beside = [rig.submit("ABLOCK", {"n": 1}), rig.submit("ABLOCK", {"n": 2})]
    wait_until(lambda: rig.journal.count("began")[2], 5)
    helped = rig.submit("BLOCK", {"n": 3})
    wait_until(lambda: rig.journal.count("began")[3], 5)
    assert beside[0].cancel() == helped.cancel() == "requested"
    for handle in (beside[0], helped):
        with pytest.raises(JobWasCancelled):
            handle.result(timeout=5)
    assert beside[1].status() in ("running", "queued") and worker.running
    assert beside[1].cancel() == "requested"
    rig.wait_ended()
    rig.redis.delete(rig.keys.cancel)
    finish(rig)


def test_a_mark_for_a_row_that_is_anothers_now_cancels_nobody(rig: Rig) -> None:
    """The steward names row, index and frame: by the time the worker looks the row may hold another frame."""

    @rig.app.task("WAIT")
    async def wait(n: int) -> int:
        rig.journal("began", n)
        while not rig.journal.notes("go"):
            await asyncio.sleep(0.005)
        return n

    worker = rig.worker()
    handle = rig.submit("WAIT", {"n": 1})
    wait_until(lambda: rig.journal.count("began")[1], 5)
    (row,) = worker.view.rows()
    worker.view.set_text(layout.C_CANCEL_ID, "0" * 26)
    worker.view.set(layout.C_CANCEL_ROW, (row.number + 1) << 32)
    wait_until(lambda: not worker.view.get(layout.C_CANCEL_ROW), 5)
    rig.journal("go")
    assert handle.result(timeout=5) == 1
    finish(rig)
