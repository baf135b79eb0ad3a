"""What the duties of one steward share: settings, board, the door to Redis, and what they have learnt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.clock import Clock
from tqe.job import IDS
from tqe.settings import Settings
from tqe.store.backlog import Backlog
from tqe.store.call import SyncDoor
from tqe.store.housekeeping import Totals
from tqe.store.keys import Keys
from tqe.telemetry import procfs

MS: Final = 1_000_000
LANES_MAX: Final = 256  # lanes of others that are learnt from frames; a script call names two keys for each


@dataclass
class Sightings:
    """When each slot's present step was first seen. A worker writes no clock, so a step is dated by whoever
    looks."""

    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def observe(self, board: Board, now_ns: int) -> None:
        """Look at every slot; called at each turn of the steward."""
        for slot in board.slots:
            step = slot.get(layout.C_IN_USER) if slot.get(layout.C_STATE) == layout.LIVE else 0
            if not step:
                self._seen.pop(slot.number, None)
            elif self._seen.get(slot.number, (0, 0))[0] != step:
                self._seen[slot.number] = (step, now_ns)

    def since_ns(self, slot: SlotView, step: int) -> int | None:
        """When this step was first seen, None if it was not yet."""
        seen, since_ns = self._seen.get(slot.number, (0, 0))
        return since_ns if seen == step else None


class Scaling(NamedTuple):
    """How many workers autoscaling wants here, between which bounds, and why: in a word, and for people."""

    workers: int
    fewest: int
    most: int
    reason: str
    text: str


@dataclass
class Context:
    """Shared by all duties of one steward; used by its one thread only."""

    # immutable
    settings: Settings
    board: Board
    door: SyncDoor
    keys: Keys
    host: str
    clock: Clock = clock.SYSTEM
    new_id: Callable[[], str] = field(default=lambda: IDS.frame_id().decode("ascii"))
    process_state: Callable[[int], str] = procfs.state

    # learnt
    lanes: dict[str, None] = field(init=False)
    sightings: Sightings = field(default_factory=Sightings)
    redis_offset_ms: int | None = None  # Redis' clock minus ours (boot time)
    totals: Totals | None = None
    backlog: Backlog | None = None
    scaling: Scaling | None = None  # None without autoscale
    not_consuming: bool = False  # jobs wait, workers could take them, and nobody does
    scoring_deaths: list[int] = field(default_factory=list)  # C_SCORING of workers that died with it

    def __post_init__(self) -> None:
        self.lanes = dict.fromkeys(self.settings.lanes)

    def now_ns(self) -> int:
        """Boot time: the clock of the board."""
        return self.clock.boottime_ns()

    def learn_lane(self, name: str) -> bool:
        """Remember a lane that others use; False if it is known or there are too many."""
        if name in self.lanes or len(self.lanes) >= LANES_MAX:
            return False
        self.lanes[name] = None
        return True

    def note_redis_ms(self, now_ms: int) -> None:
        """A reply told Redis' clock."""
        self.redis_offset_ms = now_ms - self.now_ns() // MS

    def redis_ms(self, at_ns: int) -> int:
        """A moment of ours by Redis' clock; by the wall clock as long as Redis has not told its own."""
        offset = self.redis_offset_ms
        if offset is None:
            offset = self.clock.wall_ms() - self.now_ns() // MS
        return at_ns // MS + offset

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of layout.HOST_COUNTERS; on the board, so that it outlives this steward."""
        self.board.count(name, by)

    def live_slots(self) -> list[SlotView]:
        """Slots of workers that live."""
        return self.board.in_state(layout.LIVE)


def host_name() -> str:
    """How others tell this host's workers from theirs."""
    return os.uname().nodename
