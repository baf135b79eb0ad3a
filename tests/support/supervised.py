"""A supervisor with toy workers and a toy steward, as a program of its own: `python supervised.py PLAN.json`.

The plan says what each plays; all of them append what they see to the file `events`, one JSON object a line,
so that a test can wait for it without looking into the processes.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.errors import AppImportError
from tqe.settings import Settings
from tqe.supervisor import lifecycle, process
from tqe.telemetry import logs


class Toys:
    """What the plan's processes do."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan

    def tell(self, event: str, **facts: object) -> None:
        line = json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n"
        fd = os.open(self.plan["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, line.encode())
        os.close(fd)

    def load_app(self, path: str) -> str:
        self.tell("import", by=os.getppid())
        if path == "broken:app":
            raise AppImportError("the app broken:app cannot be imported: it is broken")
        if path == "threads:app":
            import threading

            threading.Thread(target=time.sleep, args=(1000,), name="sentry", daemon=True).start()
        return path

    # -- the worker

    def worker(self, app: Any, settings: Settings, board: Board, slot: SlotView, redis_url: str) -> int:
        number = slot.get(layout.C_NUMBER)
        play = self.plan["worker"]
        self.tell(
            "worker",
            number=number,
            slot=slot.number,
            app=app,
            group=os.getpgid(0),
            cpus=sorted(os.sched_getaffinity(0)),
            random=__import__("random").random(),
            open=_open_files(),
            ignored=[n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if _ignored(n)],
        )
        if play == "broken":
            return 3
        slot.set_text(layout.C_INCARNATION, "TOY")
        slot.set(layout.C_BEAT, clock.boottime_ns())
        slot.set(layout.C_READY, 1)
        if play == "parent":
            child = os.fork()
            if child == 0:
                time.sleep(1000)
                os._exit(0)
            self.tell("grandchild", child=child)
        if play == "short":
            time.sleep(0.05)
            return 3
        if play in ("hard", "soft", "cancel"):
            return self._long_job(play, slot)
        return self._loop(play, slot)

    def _loop(self, play: str, slot: SlotView) -> int:
        while True:
            if play != "stuck":
                slot.set(layout.C_BEAT, clock.boottime_ns())
            if play == "recycle" and slot.number == 0:
                slot.set(layout.C_RECYCLE, layout.RECYCLE_JOBS)
            if play == "resync" and slot.get(layout.C_STOP) != layout.STOP_RESYNC:
                if slot.get(layout.C_STOP):
                    self.tell("stop", word=slot.get(layout.C_STOP))
                slot.set(layout.C_STOP, layout.STOP_RESYNC)  # overwrites what the supervisor said
            if slot.get(layout.C_STOP) == layout.STOP_DRAIN and play not in ("stubborn", "resync"):
                self.tell("drained", number=slot.get(layout.C_NUMBER))
                return 0
            time.sleep(0.005)

    def _long_job(self, play: str, slot: SlotView) -> int:
        def interrupted() -> None:
            hit = slot.get(layout.C_IN_USER) == slot.get(layout.C_CONDEMN_STEP)
            self.tell("interrupted", hit=hit, kind=slot.get(layout.C_CONDEMN_KIND))

        process.install_limit_signal(interrupted)
        slot.set(layout.C_ROW, 5)
        slot.set(layout.C_INDEX, 6)
        slot.set(layout.C_TIMEOUT_MS, 100 if play == "soft" else 0)
        slot.set(layout.C_HARD_MS, 300 if play == "hard" else 0)
        slot.set(layout.C_STEP, 9)
        slot.set(layout.C_IN_USER, 9)
        if play == "cancel":
            slot.set(layout.C_CANCEL_STEP, 9)
            slot.set(layout.C_CANCEL_ROW, 6 << 32 | 6)
        while slot.get(layout.C_STOP) != layout.STOP_DRAIN:
            time.sleep(0.005)
        return 0

    # -- the steward

    def steward(self, settings: Settings, board: Board, redis_url: str) -> int:
        self.tell("steward", ignored=[n for n in (signal.SIGTERM, signal.SIGINT) if _ignored(n)])
        play = self.plan.get("steward", "")
        while True:
            if play == "die":
                return 7
            if play != "hang":
                board.set(layout.H_STEWARD_BEAT, clock.boottime_ns())
            for slot in board.in_state(layout.DEAD) if play != "lazy" else []:
                self.tell(
                    "recovered",
                    slot=slot.number,
                    number=slot.get(layout.C_NUMBER),
                    signal=slot.get(layout.C_SIGNAL),
                    exit=slot.get(layout.C_EXIT),
                    kill_kind=slot.get(layout.C_KILL_KIND),
                    kill_step=slot.get(layout.C_KILL_STEP),
                )
                slot.set(layout.C_STATE, layout.RECOVERED)
            if play == "burst":
                board.set(layout.H_BURST_DONE, 1)
            if board.get(layout.H_STEWARD_STOP) and not (play == "lazy" and board.in_state(layout.DEAD)):
                self.tell("steward left")
                return 0
            time.sleep(0.01)


def _open_files() -> list[str]:
    """What is open beside stdin, stdout, stderr."""
    found = []
    for fd in sorted(os.listdir("/proc/self/fd"), key=int)[3:]:
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def _ignored(number: int) -> bool:
    return signal.getsignal(number) is process.deaf


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    toys = Toys(plan)
    logs.configure(style="json")
    settings = Settings(**{"lanes": ("high", "normal", "low"), "pin": False, **plan.get("settings", {})})
    tuning = lifecycle.Tuning(**plan.get("tuning", {}))
    try:
        return lifecycle.run(
            plan.get("app", "toy:app"),
            settings,
            toys.load_app,
            redis_url="",
            run_worker=toys.worker,
            run_steward=toys.steward,
            tuning=tuning,
        )
    except AppImportError as e:
        toys.tell("refused", text=str(e))
        return 2


if __name__ == "__main__":
    sys.exit(main())
