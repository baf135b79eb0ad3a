"""What workers capture of the jobs that they run, on real workers and a real Redis."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe.worker.capture import BURST, RATE_PER_S


def traces(rig: Rig) -> list[dict[str, Any]]:
    return [json.loads(fields[b"j"]) for _, fields in rig.redis.xrange(rig.keys.traces)]


def captured(rig: Rig, count: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(traces(rig)) >= count, 10, f"{count} traces")
    return traces(rig)


def test_a_run_is_captured_with_what_was_known_and_how_long_it_took(rig: Rig) -> None:
    rig.app.task("NAP")(nap := lambda seconds, user, items=None: time.sleep(seconds))
    assert nap
    payload = {"seconds": 0.02, "user": "ann", "items": [1, 2]}
    rig.submit("NAP", payload)
    rig.worker()
    rig.wait_ended()
    (trace,) = captured(rig, 1)
    assert trace["type"] == "NAP" and trace["lane"] == "normal" and trace["attempt"] == 1
    assert trace["fields"] == {"seconds": 0.02, "user": "ann"} and trace["outcome"] == "done"
    assert trace["run_us"] >= 20_000 and trace["payload_bytes"] == len(json.dumps(payload, separators=",:"))
    assert trace["entered_us"] <= trace["start_us"] + 2_000  # Redis' clock is known to the ms


def test_a_tasks_own_function_says_what_is_known(rig: Rig) -> None:
    rig.app.task("NAP", features=lambda p: {"longer": p["n"] * 2, "bad": float("nan"), "deep": {}})(
        lambda n: None
    )
    rig.submit("NAP", {"n": 21})
    rig.worker()
    rig.wait_ended()
    assert captured(rig, 1)[0]["fields"] == {"longer": 42}


def test_a_function_that_raises_costs_nobody_a_job_and_is_turned_off(rig: Rig) -> None:
    def bad(payload: dict[str, Any]) -> dict[str, Any]:
        rig.journal("asked", payload["n"])
        raise SystemExit(3)

    rig.app.task("NAP", features=bad)(lambda n: None)
    worker = rig.worker()
    for n in range(12):
        rig.submit("NAP", {"n": n})
    assert rig.wait_ended()["completed"] == 12
    assert all(trace.get("fields") is None for trace in captured(rig, 8))
    assert worker.running and len(rig.journal.notes("asked")) == 5


def test_failed_and_timed_out_runs_are_told_apart_and_cancelled_ones_left_out(rig: Rig) -> None:
    @rig.app.task("FAIL", max_retries=0)
    def fail() -> None:
        raise ValueError

    @rig.app.task("LATE", max_retries=0, timeout=0.05)
    async def late() -> None:
        await asyncio.sleep(60)

    @rig.app.task("ENDLESS", max_retries=0)
    async def endless() -> None:
        rig.journal("began", 1)
        await asyncio.sleep(60)

    worker = rig.worker()
    rig.steward()
    rig.submit("FAIL")
    rig.submit("LATE")
    handle = rig.submit("ENDLESS")
    wait_until(lambda: rig.journal.count("began")[1], 5, "it runs")
    handle.cancel()
    rig.wait_ended()
    assert worker.drain() == 0
    found = {trace["type"]: trace for trace in captured(rig, 2)}
    assert found.keys() == {"FAIL", "LATE"}
    assert found["FAIL"]["outcome"] == "failed" and found["LATE"]["outcome"] == "timeout"
    assert found["LATE"]["run_us"] >= 50_000


def test_only_a_few_runs_are_captured_however_many_there_are(rig: Rig) -> None:
    rig.app.task("NOOP")(lambda k: None)
    rig.frame("NOOP", [{"k": k} for k in range(20_000)])
    begun_s = time.monotonic()
    worker = rig.worker()
    rig.wait_ended()
    assert worker.drain() == 0
    took_s = time.monotonic() - begun_s
    assert 0 < len(traces(rig)) <= 1 + BURST + RATE_PER_S * took_s


def test_nothing_is_captured_where_that_is_turned_off(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(traces_max=0)
    rig.app.task("NOOP")(lambda: None)
    rig.submit("NOOP")
    worker = rig.worker()
    rig.wait_ended()
    assert worker.drain() == 0 and traces(rig) == []


def test_the_stream_drops_its_oldest_traces(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(traces_max=10)
    for n in range(2_000):
        rig.redis.xadd(rig.keys.traces, {"j": b'{"old":%d}' % n})
    rig.app.task("NOOP")(lambda: None)
    rig.submit("NOOP")
    worker = rig.worker()
    rig.wait_ended()
    assert worker.drain() == 0
    assert traces(rig)[-1]["type"] == "NOOP" and rig.redis.xlen(rig.keys.traces) < 300
