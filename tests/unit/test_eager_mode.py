"""Eager mode: jobs run at once in the test, and end as a worker would let them end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tqe import App, FailedAttempt, current_job
from tqe.errors import (
    ArgumentsError,
    EagerModeError,
    IdempotencyConflict,
    InvalidOption,
    InvalidPayload,
    JobFailed,
    JobWasCancelled,
    PartialSubmit,
    Reject,
    ResultTooLarge,
    ResultUnavailable,
    Retry,
    SettingsError,
    UnknownLane,
)
from tqe.testing import Eager, eager


@dataclass
class Point:
    """A payload that is no plain data."""

    x: int
    y: int


app = App("eager", redis_url="unix:///nowhere.sock")
tries: list[int] = []


@app.task("ADD", max_retries=2, backoff=3600)
def add(a: int, b: int = 1) -> int:
    return a + b


@app.task("FLAKY", max_retries=2, backoff=3600)
def flaky(fails: int) -> int:
    tries.append(current_job().attempt)
    if len(tries) <= fails:
        raise ConnectionError("no answer")
    return len(tries)


@app.task("SLEEPY", timeout=60, max_retries=0)
async def sleepy(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return current_job().id


@app.task("KIND")
def kind(point: Point, **more: Any) -> str:
    return f"{type(point).__name__} {sorted(more)}"


@app.task("NEST")
def nest(depth: int) -> list[str]:
    inner = nest.submit(depth - 1).result() if depth else []
    return [*inner, current_job().id]


@app.task("ODD")
def odd(what: str) -> object:
    if what == "reject":
        raise Reject("not this one")
    if what == "retry":
        raise Retry("later", delay=3600)
    if what == "exit":
        raise SystemExit(3)
    if what == "pytest":
        pytest.fail("the test's own")
    return object() if what == "object" else "x" * 100


@pytest.fixture
def ran() -> Iterator[Eager]:
    tries.clear()
    with eager(app, max_retries=1) as found:
        yield found


def test_a_job_runs_at_once_and_its_handle_tells_how_it_ended(ran: Eager) -> None:
    handle = add.submit(2, b=3)
    assert (handle.result(timeout=0), handle.status(), handle.created) == (5, "completed", True)
    assert handle.cancel() == "too_late"
    (job,) = ran.jobs
    assert (job.id, job.type, job.lane, job.attempts) == (handle.id, "ADD", "normal", 1)
    assert job.started_at is not None and job.finished_at is not None
    assert app.client.handle(handle.id).result() == 5


def test_it_is_retried_without_waiting_and_with_growing_attempts(ran: Eager) -> None:
    handle = flaky.submit(2)
    assert handle.result() == 3
    assert tries == [1, 2, 3]
    assert handle.job().attempts == 3 and handle.job().error is None


def test_it_is_dead_when_the_retries_are_used_up(ran: Eager) -> None:
    handle = flaky.submit(99)
    with pytest.raises(JobFailed, match="no answer"):
        handle.result()
    assert len(tries) == 3 and handle.status() == "dead"
    tries.clear()
    flaky.with_options(max_retries=0).submit(99)
    assert len(tries) == 1


def test_the_settings_given_count(ran: Eager) -> None:
    with pytest.raises(JobFailed, match="later"):
        odd.submit("retry").result()
    assert ran.jobs[-1].attempts == 2
    with pytest.raises(SettingsError, match="max_retires is not a setting; did you mean max_retries"):
        eager(app, max_retires=1).__enter__()
    with eager(app, result_max_bytes=64), pytest.raises(ResultTooLarge):
        odd.submit("long").result()


@pytest.mark.parametrize(("what", "said"), [("reject", "not this one"), ("exit", "SystemExit")])
def test_whatever_ends_a_job_is_told_by_its_handle(ran: Eager, what: str, said: str) -> None:
    with pytest.raises(JobFailed, match=said):
        odd.submit(what).result()


def test_what_ends_a_test_goes_through(ran: Eager) -> None:
    with pytest.raises(pytest.fail.Exception, match="the test's own"):
        odd.submit("pytest")


def test_arguments_go_through_the_codec(ran: Eager) -> None:
    with pytest.raises(ArgumentsError, match="the argument a is wrong"):
        app.submit("ADD", {"a": "1"})
    with pytest.raises(ArgumentsError, match="a is missing"):
        app.submit("ADD", {"b": 1})
    with pytest.raises(InvalidPayload):
        app.submit("ADD", {"a": float("nan")})
    assert kind.submit(point=Point(1, 2), more=3).result() == "dict ['more']"
    assert app.submit("KIND", {"point": {"x": "y" * 5_000}}).result() == "dict []"  # compressed on its way
    assert odd.submit("object").result() is None  # no JSON: dropped, as a worker does
    assert ran.jobs[-1].status == "completed"


def test_options_are_checked(ran: Eager) -> None:
    with pytest.raises(UnknownLane):
        add.with_options(priority="urgent").submit(1)
    with pytest.raises(InvalidOption):
        add.with_options(delai=1).submit(1)
    assert add.with_options(delay=3600, expires=7200, priority="high").submit(1).result() == 2
    assert ran.jobs[-1].lane == "high"
    with pytest.raises(ResultUnavailable):
        add.with_options(track=False).submit(1).result()


def test_one_key_runs_one_job(ran: Eager) -> None:
    first = add.with_options(idempotency_key="k").submit(1)
    again = add.with_options(idempotency_key="k").submit(1)
    assert (first.created, again.created, first == again) == (True, False, True)
    with pytest.raises(IdempotencyConflict):
        add.with_options(idempotency_key="k").submit(2)
    assert len(ran.jobs) == 1
    ran.clear()
    assert add.with_options(idempotency_key="k").submit(2).created


def test_bulk_submissions(ran: Eager) -> None:
    handles = add.submit_many([{"a": 1}, ({"a": 2}, {"priority": "high"}), {"a": 3}])
    assert [handle.result() for handle in handles] == [2, 3, 4]
    assert [job.lane for job in ran.jobs] == ["normal", "high", "normal"]
    with pytest.raises(PartialSubmit, match="1 jobs were created"):
        app.submit_many([("ADD", {"a": 1}), ("ADD", {"c": 1}), ("ADD", {"a": 2})])
    some = app.submit_many([("ADD", {"a": 1}), ("ADD", {"c": 1}), ("ADD", {"a": 2})], collect=True)
    assert [handle.result() for handle in some] == [2, 3] and list(some.refused) == [1]


def test_a_task_that_submits(ran: Eager) -> None:
    ids = nest.submit(3).result()
    assert ids == [job.id for job in reversed(ran.jobs)]
    with pytest.raises(EagerModeError, match="more than 32 deep"):
        nest.submit(100)


def test_the_current_job_is_only_there_inside(ran: Eager) -> None:
    nest.submit(0)
    with pytest.raises(RuntimeError, match="outside of a job"):
        current_job()


async def test_async_clients_run_both_kinds_of_task(ran: Eager) -> None:
    handle = await sleepy.asubmit(0)
    assert await handle.result() == handle.id
    assert await (await add.asubmit(1)).result() == 2
    handles = await add.asubmit_many([{"a": n} for n in range(3)])
    assert [await one.result() for one in handles] == [1, 2, 3]
    assert await handles[0].status() == "completed"


async def test_jobs_beside_each_other_know_who_they_are(ran: Eager) -> None:
    handles = await asyncio.gather(*(sleepy.asubmit(0.001) for _ in range(5)))
    assert [await one.result() for one in handles] == [one.id for one in handles]


def test_the_time_limit_of_an_async_task_counts(ran: Eager) -> None:
    assert sleepy.submit(0).result()
    with pytest.raises(JobFailed, match="past its time limit"):
        sleepy.with_options(timeout=0.01).submit(30).result()


async def test_who_waits_for_an_eager_job_can_be_cancelled(ran: Eager) -> None:
    waiting = asyncio.ensure_future(sleepy.asubmit(60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.filterwarnings("ignore:submit.. blocks the event loop")
async def test_an_async_task_that_is_submitted_from_blocking_code_in_a_loop(ran: Eager) -> None:
    assert sleepy.submit(0).result() == ran.jobs[-1].id


def test_a_type_of_another_service_cannot_run(ran: Eager) -> None:
    with pytest.raises(EagerModeError, match=r"no task of this app, which has ADD, .*tqe_queue"):
        app.submit("ELSEWHERE", {})
    with pytest.raises(EagerModeError, match="did not run in this eager mode"):
        app.client.job("0" * 26 + ".0")


def test_what_needs_a_queue_says_so(ran: Eager) -> None:
    for ask in (app.client.status, app.client.workers, lambda: app.client.pause("high")):
        with pytest.raises(EagerModeError, match="eager mode has no queue"):
            ask()


async def test_what_needs_a_queue_says_so_to_async_code(ran: Eager) -> None:
    with pytest.raises(EagerModeError, match="eager mode has no queue"):
        await app.async_client.status()


def test_a_job_that_waits_for_itself(ran: Eager) -> None:
    @app.task("SELF")
    def wait_for_myself() -> None:
        app.client.result(current_job().id)

    with pytest.raises(EagerModeError, match="it would wait for ever"):
        wait_for_myself.submit()


def test_cancelled_and_threads(ran: Eager) -> None:
    from tqe import JobCancelled

    @app.task("STOPPED")
    def stopped() -> None:
        raise JobCancelled("enough")

    with pytest.raises(JobWasCancelled):
        stopped.submit().result()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(add.submit(4).result()))
    thread.start()
    thread.join()
    assert found == [5]


def test_afterwards_the_app_is_as_before() -> None:
    other = App("other", redis_url="unix:///nowhere.sock")
    settings, client = other.settings, other.client
    with eager(other):
        assert other.client is not client
    assert other.settings is settings and other.client is client


def test_error_hooks_are_called_at_once(ran: Eager) -> None:
    told: list[FailedAttempt] = []
    app.on_error(told.append)
    try:
        flaky.submit(2)
        assert [(one.type, one.attempt, one.will_retry) for one in told] == [
            ("FLAKY", 1, True),
            ("FLAKY", 2, True),
        ]
        assert told[0].payload == {"fails": 2} and isinstance(told[0].exception, ConnectionError)
        app.error_hooks[:] = [lambda _: 1 // 0]
        tries.clear()
        with pytest.raises(ZeroDivisionError):
            flaky.submit(1)
    finally:
        app.error_hooks.clear()
