"""Scenarios of what the engine adds to each job by watching it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

import msgspec

from tqe import codec
from tqe.app import App
from tqe.bench import producing, tasks
from tqe.bench.lab import Lab, Produce
from tqe.bench.scenario import Figure, Figures, Scenario
from tqe.board import layout
from tqe.board.board import Board
from tqe.codec import hot

JOBS: Final = 2_000_000
ROUNDS: Final = 5
FRAME: Final = 1_000
_TASK: Final = "NOOP"


def _board(lab: Lab) -> Figures:
    """The stores and clocks of a job by themselves, and a job with everything but Redis; CPU, one process."""
    with lab.stage() as stage:
        jobs = lab.size(JOBS)
        before = stage.read()
        watching = stage.produce(_watching(jobs))["cpu_ns"]
        running = stage.produce(_running(jobs // 4))["cpu_ns"]
        floor = stage.produce(producing.floor())["cpu_ns"]
        stage.spent(before)
        return {"watching": watching, "running": running, "floor": floor}


class _Bare:
    """A worker's hot path without its loop: a slot of a board, the tasks, the runner."""

    def __init__(self, app: App) -> None:
        task = producing.task_of(app, _TASK)
        self.board = Board(1)
        self.slot = hot.Slot(self.board.memory, layout.slot_offset(0))
        self.entry = hot.Entry(
            name=_TASK,
            number=0,
            func=task.func,
            decode=task.decoder.decode,
            positional=task.positional,
            keyword_only=task.keyword_only,
            mode=hot.MODES[task.mode],
            is_async=False,
        )
        self.runner = hot.Runner(
            self.slot,
            {self.entry.key: self.entry},
            on_failure=_never,
            on_result=_never,
            encode=msgspec.json.encode,
        )
        self.runner.until_ns = 1 << 62
        encoder = app.client.core.encoder
        bodies = [encoder.encode(payload, task) for payload in tasks.distinct_payloads()[:FRAME]]
        self.frame = codec.pack_same(
            _TASK.encode(), bodies, frame_id=app.client.core.ids.frame_id(), lane="normal", tracked=True
        )

    def lease(self) -> hot.Lease:
        ((lease,), _, _) = hot.admit([self.frame], self.slot, {"normal": 0}, 1)
        return lease


def _never(*_: Any) -> None:
    raise RuntimeError("a job did not end as it should")


def _watching(jobs: int) -> Produce:
    def produce(app: App) -> Mapping[str, Any]:
        bare = _Bare(app)
        lease, found = bare.lease(), []
        for _ in range(ROUNDS):
            begun_ns = time.process_time_ns()
            done = bare.runner.rehearse(lease, bare.entry, jobs)
            found.append((time.process_time_ns() - begun_ns) / done)
        return {"cpu_ns": median(found)}

    return produce


def _running(jobs: int) -> Produce:
    def produce(app: App) -> Mapping[str, Any]:
        bare, found = _Bare(app), []
        for _ in range(ROUNDS):
            begun_ns, done = time.process_time_ns(), 0
            while done < jobs:
                lease = bare.lease()
                done += bare.runner.run([lease], 0, 1 << 62)[2]
                bare.slot.close_row(lease.row)
            found.append((time.process_time_ns() - begun_ns) / done)
        return {"cpu_ns": median(found)}

    return produce


SCENARIOS: Final = (
    Scenario(
        name="board",
        what="what board, clock and metrics cost a job, and the hot path without Redis",
        figures=(
            Figure(name="watching", unit="ns/job", label="board, clock, metrics", mark=15, stretch=8),
            Figure(name="running", unit="ns/job", label="check, decode, call, board; frames of 1,000"),
            Figure(name="floor", unit="ns/job", label="floor: decode and call in a bare loop"),
        ),
        play=_board,
    ),
)
