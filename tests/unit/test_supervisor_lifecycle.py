"""What of the supervisor needs no processes: slots, backoff, names of deaths."""

import signal
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tqe.board import layout
from tqe.board.board import Board
from tqe.errors import SettingsError
from tqe.settings import Settings
from tqe.supervisor import affinity, process
from tqe.supervisor.lifecycle import Backoff, Supervisor, Tuning, check_port, slots_of
from tqe.supervisor.process import SOFT_SIGNAL, Death, signal_name

S = 1_000_000_000


def test_each_worker_has_two_slots_and_two_are_for_replacements() -> None:
    assert slots_of(8) == 18
    assert slots_of(60) == 96


def test_too_many_workers_are_refused_with_what_to_do() -> None:
    with pytest.raises(SettingsError, match="at most 94 workers; start a second one"):
        slots_of(95)


def test_backoff_doubles_to_its_cap_half_fixed_half_random() -> None:
    backoff = Backoff(Tuning())
    delays = [backoff.died(0, young=True) for _ in range(12)]
    wholes = [min(30 * S, S // 10 << k) for k in range(12)]
    assert all(whole // 2 <= delay <= whole for delay, whole in zip(delays, wholes, strict=True))
    assert len({delay * 2 - whole for delay, whole in zip(delays[9:], wholes[9:], strict=True)}) > 1  # jitter


def test_a_backoff_may_have_a_lower_cap() -> None:
    backoff = Backoff(Tuning(), cap_ns=S)
    assert max(backoff.died(0, young=True) for _ in range(20)) <= S


def test_backoff_starts_over_after_a_life_that_worked() -> None:
    backoff = Backoff(Tuning())
    for _ in range(5):
        backoff.died(0, young=True)
    assert backoff.died(7, young=False) == 0
    assert backoff.not_before_ns == 7
    assert backoff.died(7, young=True) <= S // 10


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SettingsError, match="choose another"):
            check_port("127.0.0.1", other.getsockname()[1])


def test_deaths_have_names() -> None:
    assert Death(1, signal.SIGSEGV, 0).how == "SIGSEGV"
    assert Death(1, 0, 3).how == "exit 3"
    assert signal_name(SOFT_SIGNAL) == f"signal {int(SOFT_SIGNAL)}"


def test_numpy_draws_other_numbers_in_each_child(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[object, ...]] = []
    numpy = SimpleNamespace(random=SimpleNamespace(seed=lambda *args: seeds.append(args)))
    monkeypatch.setitem(sys.modules, "numpy", numpy)  # type: ignore[arg-type]
    process._reseed()
    assert seeds == [()]  # fresh entropy, no number of ours


class Family:
    """A supervisor whose children are numbers: forks are counted, deaths are told."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, procs: int, autoscale: tuple[int, int] | None = None
    ) -> None:
        self.settings = Settings(
            procs=procs, autoscale=autoscale, redis_url="redis://127.0.0.1:1", grace_ms=600_000
        )
        self.board = Board(slots_of(procs))
        self.supervisor = Supervisor(
            self.settings,
            self.board,
            work=lambda slot: 0,
            steward=lambda: 0,
            pins=affinity.plan(procs, pin=False),
            tuning=Tuning(steward_stale_min_ns=10**15),
        )
        self.supervisor._steward_pid = 1_000_000
        self._pids = iter(range(2_000_000, 3_000_000))
        self._deaths: list[Death] = []
        monkeypatch.setattr(process, "fork", lambda *args, **kwargs: next(self._pids))
        monkeypatch.setattr(process, "reap", lambda own: self._deaths)
        monkeypatch.setattr(process, "kill_group", lambda pid: None)

    def look(self, *signals: int, dead: tuple[int, ...] = ()) -> None:
        """One turn of the supervisor; those dead by SIGKILL are recovered by the next one."""
        self._deaths = [Death(pid, signal.SIGKILL, 0) for pid in dead]
        self.supervisor._once(list(signals))
        for slot in self.board.in_state(layout.DEAD):
            slot.set(layout.C_STATE, layout.RECOVERED)

    def want(self, workers: int) -> None:
        """What the steward decides."""
        self.board.set(layout.H_WANTED, workers)

    @property
    def leaving(self) -> list[int]:
        """Numbers of the workers that drain."""
        lives = self.supervisor._lives.values()
        return [life.number for life in lives if life.slot.get(layout.C_STOP) == layout.STOP_DRAIN]

    @property
    def pids(self) -> list[int]:
        return sorted(self.supervisor._lives)

    def get_ready(self) -> None:
        for life in self.supervisor._lives.values():
            life.slot.set(layout.C_READY, 1)
            life.slot.put("completed", 1)
            life.slot.set(layout.C_BEAT, 1 << 62)


@pytest.mark.parametrize("draining", [True, False])
def test_a_replacement_that_dies_leaves_as_many_workers_as_before(
    monkeypatch: pytest.MonkeyPatch, draining: bool
) -> None:
    """The old worker drains for minutes, or was not told to yet, when the new one dies of its job."""
    family = Family(monkeypatch, 1)
    family.look()
    (old,) = family.pids
    family.get_ready()
    family.look(signal.SIGHUP)
    (new,) = set(family.pids) - {old}
    family.get_ready()
    if draining:
        family.look()
    family.look(dead=(new,))
    family.look()
    family.get_ready()
    family.look()
    family.look()
    assert old in family.pids and len(family.pids) == 2, "the old one, and one in the place of the dead one"
    family.look(dead=(old,))
    for _ in range(3):
        family.get_ready()
        family.look()
    assert len(family.pids) == 1


def test_who_asks_to_be_replaced_asks_again_when_the_replacement_did_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a worker that has grown too large would keep its memory for ever after one unlucky start."""
    family = Family(monkeypatch, 1)
    family.supervisor.tuning = replace(family.supervisor.tuning, turn_pause_ns=10**15)
    family.look()
    (old,) = family.pids
    family.get_ready()
    family.supervisor._lives[old].slot.set(layout.C_RECYCLE, layout.RECYCLE_MEMORY)
    family.look()
    family.look()
    (new,) = set(family.pids) - {old}
    family.look(dead=(new,))
    family.look()
    assert family.pids == [old]
    for _ in range(3):
        family.look()
    assert family.pids == [old], "not at once"
    family.supervisor._turns_from_ns = 0
    family.look()
    family.look()
    assert len(family.pids) == 2


# ------------------------------------------------------------------ autoscale


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Family:
    """One to four workers, of which two are wanted and ready."""
    family = Family(monkeypatch, 4, autoscale=(1, 4))
    family.want(2)
    family.look()
    family.get_ready()
    assert len(family.pids) == 2
    return family


def test_more_workers_start_at_once_and_never_more_than_the_most(scaled: Family) -> None:
    scaled.want(4)
    scaled.look()
    assert len(scaled.pids) == 4
    scaled.want(9)
    scaled.look()
    assert len(scaled.pids) == 4 and not scaled.leaving


def test_workers_are_let_go_one_after_the_other_the_idle_first(scaled: Family) -> None:
    scaled.want(4)
    scaled.look()
    scaled.get_ready()
    for life in scaled.supervisor._lives.values():
        life.slot.set(layout.C_IN_USER, life.number != 1)
    scaled.want(2)
    for _ in range(3):
        scaled.look()
    assert scaled.leaving == [1]
    (gone,) = [pid for pid, life in scaled.supervisor._lives.items() if life.number == 1]
    scaled.look(dead=(gone,))
    scaled.look()
    assert scaled.leaving == [3], "all are busy: the last one"
    assert scaled.board.counted()["worker_crashes"] == 0


def test_who_is_let_go_may_end_its_job_however_long_that_takes(
    scaled: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(process, "kill_group", killed.append)
    scaled.want(1)
    scaled.look()
    (life,) = [one for one in scaled.supervisor._lives.values() if one.stop_at_ns is not None]
    scaled.supervisor._keep_telling(life, 30 * 24 * 3600 * S)
    assert not killed
    scaled.look(signal.SIGTERM)
    assert life.stop_at_ns is not None and life.stop_at_ns <= scaled.supervisor._stop.deadline_ns  # type: ignore[union-attr]


def test_a_new_backlog_does_not_wait_for_who_leaves(scaled: Family) -> None:
    scaled.want(1)
    scaled.look()
    assert scaled.leaving == [1]
    scaled.want(4)
    scaled.look()
    assert len(scaled.pids) == 5 and scaled.leaving == [1]


def test_an_early_death_is_not_got_round_by_another_number(scaled: Family) -> None:
    (first, second) = scaled.pids
    scaled.supervisor._lives[first].slot.set(layout.C_READY, 0)
    scaled.supervisor._backoffs[0].failures = 8
    scaled.look(dead=(first,))
    scaled.look()
    assert scaled.pids == [second], "its number waits, and no other is started for it"


def test_a_replacement_in_turn_is_not_let_go_halfway(scaled: Family) -> None:
    scaled.look(signal.SIGHUP)
    assert len(scaled.pids) == 3
    scaled.want(1)
    scaled.look()
    assert not scaled.leaving
