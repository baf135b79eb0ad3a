"""The supervisor with real processes: births, deaths, limits, drains; workers and steward are toys."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import supervised
from tests.support.waiting import wait_until
from tqe.board import layout
from tqe.telemetry import procfs

_S = 1_000_000_000


class Run:
    """A supervisor under test."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.events_file = folder / "events"
        self.log_file = folder / "log"
        plan_file = folder / "plan.json"
        plan_file.write_text(json.dumps({"events": str(self.events_file), **plan}))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, supervised.__file__, str(plan_file)], stderr=log, stdin=subprocess.DEVNULL
            )
        self.pid = self.process.pid

    def events(self, name: str = "") -> list[dict[str, Any]]:
        if not self.events_file.exists():
            return []
        found = [json.loads(line) for line in self.events_file.read_text().splitlines()]
        return [event for event in found if not name or event["event"] == name]

    def wait(self, name: str, count: int = 1, timeout: float = 10.0) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]] | None:
            found = self.events(name)
            return found if len(found) >= count else None

        found = wait_until(enough, timeout, f"{count} events {name!r}; log:\n{self.log()}")
        assert found is not None
        return found

    def log(self) -> str:
        return "\n".join(line["event"] for line in self.lines())

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines() if line.startswith("{")]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, timeout: float = 10.0) -> int:
        return self.process.wait(timeout)

    def everyone(self) -> set[int]:
        return {e["pid"] for e in self.events() if e["event"] in ("worker", "steward")}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(worker: str = "", **plan: Any) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        settings = {"procs": 2, "grace_ms": 5_000, **plan.pop("settings", {})}
        run = Run(folder, {"worker": worker, "settings": settings, **plan})
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.close()


def gone(pid: int) -> bool:
    return procfs.state(pid) in ("", "Z")


# --- births ---


def test_workers_are_born_clean(start: Start) -> None:
    run = start()
    workers = run.wait("worker", 2)
    assert [w["app"] for w in workers] == ["toy:app"] * 2
    assert {w["number"] for w in workers} == {0, 1}
    assert all(w["group"] == w["pid"] for w in workers)  # each its own process group
    assert all(len(w["ignored"]) == 3 for w in workers)
    assert len({w["random"] for w in workers}) == 2  # or they would share their jitter
    # nothing but the board: neither the supervisor's pipe nor another's connection
    assert all("tqe-board" in name for w in workers for name in w["open"])
    # a probe and the supervisor import; no worker does
    assert {e["pid"] for e in run.events("import")}.isdisjoint({w["pid"] for w in workers})


def test_without_preload_each_worker_imports(start: Start) -> None:
    run = start(settings={"preload": False})
    workers = run.wait("worker", 2)
    assert {e["pid"] for e in run.events("import")} == {w["pid"] for w in workers}


def test_threads_at_import_are_named_and_each_worker_imports(start: Start) -> None:
    run = start(app="threads:app")
    workers = run.wait("worker", 2)
    imports = {e["pid"] for e in run.events("import")}
    assert {w["pid"] for w in workers} < imports
    assert run.pid not in imports  # the supervisor itself stays without threads
    assert "1 threads (" in run.log()
    assert run.log().count("threads:app leaves") == 1


def test_an_app_that_cannot_be_imported_is_refused_before_any_fork(start: Start) -> None:
    run = start(app="broken:app")
    assert run.ended() == 2
    assert run.events("worker") == []
    assert "is broken" in run.events("refused")[0]["text"]


def test_pins_are_told_and_kept(start: Start) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    run = start(settings={"procs": len(allowed), "pin": True})
    workers = run.wait("worker", len(allowed))
    assert "workers are " in run.log()
    if "pinned to CPUs" in run.log():
        assert sorted(w["cpus"] for w in workers) == [[cpu] for cpu in allowed]
    else:
        assert all(w["cpus"] == allowed for w in workers)


# --- deaths ---


def test_children_die_with_their_parent(start: Start) -> None:
    run = start()
    run.wait("worker", 2)
    run.wait("steward")
    children = run.everyone()
    run.signal(signal.SIGKILL)
    run.ended()
    wait_until(lambda: all(gone(pid) for pid in children), what="all children are gone")


def test_a_killed_worker_is_recovered_and_replaced_in_another_slot(start: Start) -> None:
    run = start()
    victim = run.wait("worker", 2)[0]
    os.kill(victim["pid"], signal.SIGKILL)
    recovered = run.wait("recovered")[0]
    assert (recovered["slot"], recovered["signal"], recovered["kill_kind"]) == (victim["slot"], 9, 0)
    new = run.wait("worker", 3)[2]
    assert new["number"] == victim["number"]


def test_what_a_worker_left_running_dies_with_it(start: Start) -> None:
    run = start("parent", settings={"procs": 1})
    child = run.wait("grandchild")[0]
    os.kill(child["pid"], signal.SIGKILL)
    wait_until(lambda: gone(child["child"]), what="the grandchild is gone")


def test_no_slot_is_used_again_before_it_is_recovered(start: Start) -> None:
    run = start(steward="lazy", settings={"procs": 1}, tuning={"young_ns": 0})
    for lives in range(1, 5):  # 2 * 1 + 2 slots
        workers = run.wait("worker", lives)
        wait_until(lambda last=workers[-1]: procfs.state(last["pid"]) == "S")  # type: ignore[misc]
        os.kill(workers[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: "no slot is free" in run.log(), what="the supervisor waits for a slot")
    assert sorted(w["slot"] for w in run.events("worker")) == [0, 1, 2, 3]


def test_who_dies_young_is_replaced_later_and_later(start: Start) -> None:
    run = start("short", settings={"procs": 1})
    run.wait("worker", 4)
    delays = [
        float(line["event"].rpartition("starts in ")[2].split()[0])
        for line in run.lines()
        if "a replacement starts in" in line["event"]
    ]
    assert len(delays) >= 3
    for k, delay in enumerate(delays[:3]):  # half fixed, half random, doubling
        assert 0.05 * 2**k <= delay + 0.05 and delay <= 0.1 * 2**k + 0.05


def test_workers_that_cannot_start_end_the_supervisor(start: Start) -> None:
    run = start("broken")
    assert run.ended() == 1
    assert (
        "giving up: 5 workers in a row ended before they were ready (the last one with exit 3)" in run.log()
    )
    assert all(gone(pid) for pid in run.everyone())


def test_a_dead_steward_is_replaced(start: Start) -> None:
    run = start()
    first = run.wait("steward")[0]
    os.kill(first["pid"], signal.SIGKILL)
    assert run.wait("steward", 2)[1]["pid"] != first["pid"]
    assert all(not gone(w["pid"]) for w in run.events("worker"))


def test_a_steward_that_keeps_dying_is_replaced_well_within_a_lease(start: Start) -> None:
    run = start(steward="die", settings={"lease_ms": 3_000})
    run.wait("steward", 8)
    delays = [
        float(line["event"].rpartition("starts in ")[2].split()[0])
        for line in run.lines()
        if "a new one starts in" in line["event"]
    ]
    assert len(delays) >= 7 and max(delays) <= 0.5
    assert run.process.poll() is None


def test_a_steward_that_hangs_is_killed_and_replaced(start: Start) -> None:
    run = start(settings={"lease_ms": 1_000}, tuning={"steward_stale_min_ns": _S // 5})
    first = run.wait("steward")[0]
    run.wait("worker", 2)
    os.kill(first["pid"], signal.SIGSTOP)
    run.wait("steward", 2)
    assert gone(first["pid"])
    assert "the steward has not moved" in run.log()


def test_a_worker_whose_loop_stands_still_is_killed(start: Start) -> None:
    run = start("stuck", settings={"lease_ms": 1_000, "procs": 1}, tuning={"stuck_min_ns": _S // 10})
    recovered = run.wait("recovered")[0]
    assert (recovered["signal"], recovered["kill_kind"]) == (9, layout.KILL_STUCK)


def test_a_worker_that_asks_to_be_replaced_is_drained_after_its_replacement_is_there(start: Start) -> None:
    run = start("recycle", settings={"procs": 1})
    run.wait("drained")
    order = [e["event"] for e in run.events() if e["event"] in ("worker", "drained")]
    assert order == ["worker", "worker", "drained"]
    assert "it has run its jobs" in run.log()
    assert "a replacement starts" not in run.log()


# --- limits ---


def test_a_job_past_its_hard_limit_is_killed(start: Start) -> None:
    run = start("hard", settings={"procs": 1})
    recovered = run.wait("recovered")[0]
    assert (recovered["signal"], recovered["kill_kind"], recovered["kill_step"]) == (
        9,
        layout.KILL_HARD_LIMIT,
        9,
    )


@pytest.mark.parametrize(("play", "kind"), [("soft", layout.CONDEMN_SOFT), ("cancel", layout.CONDEMN_CANCEL)])
def test_a_condemned_job_is_interrupted_again_and_again(start: Start, play: str, kind: int) -> None:
    run = start(play, settings={"procs": 1})
    told = run.wait("interrupted", 2)
    assert [(e["hit"], e["kind"]) for e in told[:2]] == [(True, kind)] * 2


# --- drains ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_ends_everyone_and_the_steward_last(start: Start, number: int) -> None:
    run = start()
    run.wait("worker", 2)
    run.signal(number)
    assert run.ended() == 0
    assert [e["event"] for e in run.events()][-1] == "steward left"
    assert len(run.events("drained")) == 2
    assert [(e["signal"], e["exit"]) for e in run.events("recovered")] == [(0, 0)] * 2
    assert all(gone(pid) for pid in run.everyone())


def test_the_whole_process_group_may_get_ctrl_c(start: Start) -> None:
    run = start()
    run.wait("worker", 2)
    run.wait("steward")
    for pid in [run.pid, *run.everyone()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    assert run.ended() == 0
    assert len(run.events("drained")) == 2


def test_after_the_grace_workers_are_killed_uncharged(start: Start) -> None:
    run = start("stubborn", settings={"grace_ms": 300})
    run.wait("worker", 2)
    run.signal(signal.SIGTERM)
    assert run.ended() == 0
    assert [(e["signal"], e["kill_kind"]) for e in run.events("recovered")] == [(9, layout.KILL_DRAIN)] * 2


def test_a_second_signal_stops_now(start: Start) -> None:
    run = start("stubborn", settings={"grace_ms": 600_000})
    run.wait("worker", 2)
    run.signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: draining" in run.log())
    run.signal(signal.SIGTERM)
    assert run.ended() == 0
    assert len(run.events("recovered")) == 2


def test_a_stop_word_that_was_overwritten_is_said_again(start: Start) -> None:
    run = start("resync", settings={"procs": 1, "grace_ms": 600_000})
    run.wait("worker")
    run.signal(signal.SIGTERM)
    assert [e["word"] for e in run.wait("stop", 3)[:3]] == [layout.STOP_DRAIN] * 3


def test_what_cannot_be_recovered_is_said_and_the_exit_code_tells(start: Start) -> None:
    run = start(steward="lazy", tuning={"steward_stop_ns": _S // 5})
    run.wait("worker", 2)
    run.signal(signal.SIGTERM)
    assert run.ended() == 1
    assert "what 2 workers held could not be given back" in run.log()


def test_a_steward_that_dies_during_the_stop_is_replaced(start: Start) -> None:
    run = start("stubborn", settings={"grace_ms": 400})
    run.wait("worker", 2)
    first = run.wait("steward")[0]
    run.signal(signal.SIGTERM)
    os.kill(first["pid"], signal.SIGKILL)
    assert run.ended() == 0
    assert len(run.events("steward")) == 2
    assert len(run.events("recovered")) == 2


def test_burst_ends_when_the_steward_finds_nothing_left(start: Start) -> None:
    run = start(steward="burst", settings={"burst": True})
    assert run.ended() == 0
    assert "no job is left" in run.log()


# --- SIGHUP ---


def test_sighup_replaces_one_after_the_other_without_a_gap(start: Start) -> None:
    run = start()
    old = run.wait("worker", 2)
    run.signal(signal.SIGHUP)
    run.wait("drained", 2)
    new = run.wait("worker", 4)[2:]
    assert {w["number"] for w in new} == {0, 1}
    order = [(e["event"], e["number"]) for e in run.events() if e["event"] in ("worker", "drained")][2:]
    first, second = new[0]["number"], new[1]["number"]
    assert order == [("worker", first), ("drained", first), ("worker", second), ("drained", second)]
    assert {w["pid"] for w in old} == {e["pid"] for e in run.events("drained")}
    assert "no new code is picked up" in run.log()
    wait_until(lambda: len(run.events("recovered")) == 2)
    assert run.process.poll() is None
