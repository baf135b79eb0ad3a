"""`@app.on_error`: told of every attempt that fails; nothing that a hook does hurts a job."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe import App, FailedAttempt, Reject, Retry, SoftTimeLimit, current_job
from tqe.errors import RegistrationError
from tqe.worker import reporting

Told = Callable[[], list[tuple[Any, ...]]]


@pytest.fixture
def told(rig: Rig) -> Told:
    """What the hook of the rig's app was told, in the journal."""

    @rig.app.on_error
    def report(failed: FailedAttempt) -> None:
        kind = type(failed.exception).__name__ if failed.exception is not None else None
        try:
            seen = current_job().id == failed.id
        except RuntimeError:
            seen = False
        rig.journal(
            "told", failed.type, failed.attempt, failed.reason, kind, failed.will_retry,
            failed.payload, seen, threading.current_thread().name,
        )  # fmt: skip

    return lambda: [note.words[1:] for note in rig.journal.notes("told")]


def test_each_kind_of_failure_is_told(rig: Rig, told: Told) -> None:
    @rig.app.task("RAISES", max_retries=1, backoff=0)
    def raises(what: str) -> None:
        raise {"value": ValueError("odd"), "reject": Reject("no"), "retry": Retry("again", delay=0)}[what]

    @rig.app.task("SLOW", max_retries=0)
    def slow() -> None:
        raise SoftTimeLimit  # as the supervisor's signal does

    @rig.app.task("SLOWER", timeout=0.05, max_retries=0)
    async def slower() -> None:
        await asyncio.sleep(60)

    @rig.app.task("FINE")
    def fine(n: int) -> None: ...

    rig.worker()
    rig.steward()
    rig.submit("RAISES", {"what": "value"})
    rig.submit("RAISES", {"what": "reject"})
    rig.submit("RAISES", {"what": "retry"})
    rig.submit("SLOW", {})
    rig.submit("SLOWER", {})
    rig.client.submit("NOBODY", {"n": 1})
    rig.submit("FINE", {"n": 1})
    wait_until(lambda: len(told()) >= 8, 30, "eight failures are told")
    thread = (True, "tqe-errors")
    assert sorted(map(repr, told())) == sorted(
        map(
            repr,
            [
                ("RAISES", 1, "failed", "ValueError", True, {"what": "value"}, *thread),
                ("RAISES", 2, "failed", "ValueError", False, {"what": "value"}, *thread),
                ("RAISES", 1, "rejected", "Reject", False, {"what": "reject"}, *thread),
                ("RAISES", 1, "failed", "Retry", True, {"what": "retry"}, *thread),
                ("RAISES", 2, "failed", "Retry", False, {"what": "retry"}, *thread),
                ("SLOW", 1, "timeout", "SoftTimeLimit", False, {}, *thread),
                ("SLOWER", 1, "timeout", "SoftTimeLimit", False, {}, *thread),
                ("NOBODY", 1, "unknown_type", None, True, {"n": 1}, False, "tqe-errors"),
            ],
        )
    )


def test_a_job_that_swallows_its_limit_is_told_before_its_worker_ends(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(hard_after_ms=50, crashes_max=2)

    @rig.app.on_error
    def report(failed: FailedAttempt) -> None:
        rig.journal("told", failed.reason, failed.will_retry, failed.crashes, failed.payload)

    @rig.app.task("STUBBORN", timeout=0.05, max_retries=0)
    async def stubborn(n: int) -> None:
        while True:
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                rig.journal("swallowed")

    rig.worker(ready=False)
    rig.submit("STUBBORN", {"n": 7})
    found = wait_until(lambda: [note.words for note in rig.journal.notes("told")], 30, "it is told")
    assert found[0][1:] == ("hard_limit", True, 0, {"n": 7})


def test_hooks_that_raise_or_hang_hurt_nobody(rig: Rig) -> None:
    @rig.app.on_error
    def hangs(failed: FailedAttempt) -> None:
        rig.journal("hook", failed.id)
        if failed.payload["n"] % 2:
            raise SystemExit("odd")
        if failed.payload["n"] > 1:
            time.sleep(60)

    @rig.app.task("BAD", max_retries=0)
    def bad(n: int) -> None:
        raise SoftTimeLimit if n % 3 else ValueError(n)

    rig.worker()
    rig.frame("BAD", [{"n": n} for n in range(reporting.WAITING_MAX * 3)])
    rig.wait_ended(reporting.WAITING_MAX * 3, timeout=30)
    assert rig.books().states()["dead"] == reporting.WAITING_MAX * 3
    assert 1 <= len(rig.journal.notes("hook")) <= 3


def test_a_hook_that_finds_no_room_for_its_thread_is_told_later(
    rig: Rig, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    @rig.app.task("BAD", max_retries=0)
    def bad(n: int) -> None:
        monkeypatch.setattr(threading.Thread, "start", start if n else refuse)
        raise ValueError(n)

    worker = rig.worker()
    rig.frame("BAD", [{"n": n} for n in range(2)])
    rig.wait_ended(2)
    wait_until(lambda: len(told()) == 2, 10, "both are told")
    assert worker.running, worker.told()


def test_the_context_of_the_job_is_that_of_the_hook() -> None:
    tag: contextvars.ContextVar[str] = contextvars.ContextVar("tag")
    seen: list[str] = []
    reporter = reporting.Reporter([lambda _: seen.append(tag.get("none"))])
    failed = FailedAttempt(
        id="x.0", type="X", lane="high", attempt=1, crashes=0, reason="failed", message="",
        exception=None, will_retry=False, retry_in_s=0.0, _payload=dict,
    )  # fmt: skip

    def job() -> None:
        tag.set("mine")
        reporter.tell(failed, None)

    contextvars.copy_context().run(job)
    reporter.tell(failed, None)
    reporter.close(10)
    assert seen == ["mine", "none"]


def test_hooks_are_plain_functions() -> None:
    async def hook(_: FailedAttempt) -> None: ...

    with pytest.raises(RegistrationError, match="hooks of workers are plain functions"):
        App().on_error(hook)
