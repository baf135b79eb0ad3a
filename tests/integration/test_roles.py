"""The role at work: while both kinds of jobs come, coroutines start beside synchronous jobs, however long."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe import codec
from tqe.board import layout
from tqe.steward.roles import Roles

FOR_EVER_NS = 1 << 62


def define(rig: Rig) -> None:
    @rig.app.task("CALL")
    async def call() -> None:
        rig.journal("call")
        await asyncio.sleep(0.02)

    @rig.app.task("LONG")
    def long() -> None:
        rig.journal("long", threading.current_thread() is threading.main_thread())
        wait_until(lambda: bool(rig.journal.notes("go")), 20)


def notes(rig: Rig, word: str, number: int = 1) -> list[tuple[Any, ...]]:
    wait_until(lambda: len(rig.journal.notes(word)) >= number, 10, f"{word}: {rig.journal.notes()}")
    return [note.words for note in rig.journal.notes(word)]


def finish(rig: Rig) -> None:
    rig.journal("go")
    rig.wait_ended()
    for worker in rig.workers:
        assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


def test_a_loop_that_is_kept_free_starts_coroutines_while_a_sync_job_runs(rig: Rig) -> None:
    define(rig)
    rig.worker().view.set(layout.C_APART_UNTIL, FOR_EVER_NS)
    rig.submit("LONG")
    assert notes(rig, "long") == [("long", False)]
    rig.submit("CALL")
    notes(rig, "call")
    finish(rig)


def test_a_role_that_nobody_renews_is_void(rig: Rig) -> None:
    define(rig)
    rig.worker().view.set(layout.C_APART_UNTIL, 1)
    rig.submit("LONG")
    assert notes(rig, "long") == [("long", True)]
    finish(rig)


def test_a_suspect_runs_on_the_main_thread_whatever_the_role(rig: Rig) -> None:
    define(rig)
    rig.submit("LONG")
    key = rig.keys.queue("normal")
    (frame,) = rig.redis.lrange(key, 0, -1)
    rig.redis.lset(key, 0, codec.rewrite(frame, flags=codec.peek(frame).flags | codec.SUSPECT))
    rig.client.pause("normal")
    rig.worker().view.set(layout.C_APART_UNTIL, FOR_EVER_NS)
    rig.client.resume("normal")
    assert notes(rig, "long") == [("long", True)]
    finish(rig)


def test_coroutines_start_though_every_worker_has_a_long_sync_job(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Roles, "period_s", 0.02)
    define(rig)

    @rig.app.task("SYNC")
    def sync() -> None:
        threading.Event().wait(0.01)

    workers = [rig.worker(), rig.worker()]
    rig.steward()

    def both_kinds_come() -> bool:
        if len(rig.ids) - rig.stats().get("completed", 0) < 6:
            rig.submit("CALL")
            rig.submit("SYNC")
        return any(one.view.get(layout.C_APART_UNTIL) for one in workers)

    wait_until(both_kinds_come, 20, "a loop is kept free")
    rig.wait_ended()
    ran = len(rig.journal.notes("call"))
    rig.frame("LONG", [{}] * 2)
    assert sorted(notes(rig, "long", 2)) == [("long", False), ("long", True)]
    rig.submit("CALL")
    notes(rig, "call", ran + 1)
    finish(rig)
