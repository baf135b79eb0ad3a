"""What of the supervisor needs no processes: slots, backoff, names of deaths."""

import signal
import socket
import sys
from types import SimpleNamespace

import pytest

from tqe.errors import SettingsError
from tqe.supervisor import process
from tqe.supervisor.lifecycle import Backoff, Tuning, check_port, slots_of
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
            check_port(other.getsockname()[1])


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
