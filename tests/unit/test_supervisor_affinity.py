"""Pins: only for who owns the CPUs, least loaded first, with a reason."""

from pathlib import Path

import pytest

from tqe import cpus
from tqe.supervisor import affinity


def test_no_pins_when_switched_off() -> None:
    assert affinity.plan(1, pin=False, allowed={0}, quota=0.0) == affinity.Pins(
        (), "not pinned: switched off"
    )


def test_no_pins_under_a_quota() -> None:
    pins = affinity.plan(1, pin=True, allowed={0, 1}, quota=1.5)
    assert pins.cpus == () and "quota of 1.5" in pins.reason


def test_no_pins_with_more_workers_than_cpus() -> None:
    pins = affinity.plan(8, pin=True, allowed={0, 1}, quota=0.0)
    assert pins.cpus == () and "8 workers are more than the 2" in pins.reason
    assert pins.cpu(0) is None


def test_each_worker_gets_a_cpu_of_the_allowed_ones() -> None:
    pins = affinity.plan(2, pin=True, allowed={3, 5}, quota=0.0)
    assert (pins.cpu(0), pins.cpu(1), pins.cpu(2)) == (3, 5, None)


def test_the_least_loaded_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9\ncpu0 100 0 0 50 0 0\ncpu1 100 0 0 50 0 0\ncpu2 100 0 0 50 0 0\nintr 1\n")

    def time_passes(seconds: float) -> None:
        # cpu0 worked, cpu1 idled, cpu2 waited for a disk
        stat.write_text("cpu0 110 0 0 50 0 0\ncpu1 100 0 0 60 0 0\ncpu2 101 0 0 50 9 0\n")

    monkeypatch.setattr(affinity.time, "sleep", time_passes)
    pins = affinity.plan(2, pin=True, allowed={0, 1, 2}, quota=0.0, stat=stat)
    assert pins.cpus == (1, 2)


@pytest.mark.parametrize(
    ("files", "line", "expected"),
    [
        ({}, "0::/", 0.0),
        ({"cpu.max": "max 100000"}, "0::/", 0.0),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        # the path of the host, seen from inside of a namespace: only the root is there
        ({"cpu.max": "200000 100000"}, "0::/kubepods/pod1", 2.0),
        # the tighter of two levels counts
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 0.0),
        ({"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, "3:cpu:/x", 0.5),
        ({"cpu.max": "garbage"}, "0::/", 0.0),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], line: str, expected: float) -> None:
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    mine = tmp_path / "mine"
    mine.write_text(f"{line}\n")
    assert cpus.quota(root, mine) == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.0, 4), (0.5, 1), (1.0, 1), (2.5, 3), (4.0, 4), (64.0, 4)])
def test_usable_cpus_are_the_fewer_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(cpus, "allowed", lambda: {0, 1, 4, 5})
    monkeypatch.setattr(cpus, "quota", lambda: quota)
    assert cpus.usable() == expected
