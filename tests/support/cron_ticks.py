"""A steward's cron duty as a program: `python cron_ticks.py URL BASE_MS REAL_MS SPEED`, until it is killed.

Time runs SPEED times faster than real time from BASE_MS on, which was at REAL_MS by the wall clock, so that a
schedule of minutes ticks many times a second.
"""

import sys

from tests.support.fake_clock import FakeClock
from tqe import clock
from tqe.board.board import Board
from tqe.schedule import Timetable, make
from tqe.settings import Settings
from tqe.steward.context import Context
from tqe.steward.cron import Cron
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys

TIMETABLE = Timetable(
    app="m:app",
    born_ms=1,
    schedules=(
        make(type="EACH", every=60, missed="all", options={"lane": "high"}),
        make(type="TWO", expression="*/2 * * * *", missed="all", options={"lane": "low"}),
    ),
)


def main(url: str, base_ms: int, real_ms: int, speed: int) -> None:
    def now_ms(told_ms: int) -> int:
        return base_ms + (clock.wall_ms() - real_ms) * speed

    door = SyncDoor(connect(url))
    context = Context(Settings(), Board(1), door, Keys(), "here", FakeClock())
    duty = Cron(context, TIMETABLE, redis_now_ms=now_ms)
    while True:
        duty.run_once()


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:]))
