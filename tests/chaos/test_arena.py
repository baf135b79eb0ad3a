"""Proves the arena without workers: what producers were told is in the store, over dead servers too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.arena import Arena
from tests.chaos.checker import Limits
from tests.support.redis_server import RedisServer

RUNNING = Limits(quiescent=False)


@pytest.fixture
def idle(make_redis: Callable[..., RedisServer], tmp_path: Path) -> Iterator[Arena]:
    with contextlib.closing(Arena(make_redis(), tmp_path, 7)) as made:
        yield made


def test_accepted_jobs_are_in_the_store(idle: Arena) -> None:
    producer = idle.producer()
    with idle.auditing(0.02):
        producer.mixed(1_000)
        first = producer.single("QUICK", {}, idempotency_key="k")
        producer.number -= 1  # the same payload again
        assert first is not None
        again = producer.app.submit("QUICK", {"n": producer.number}, idempotency_key="k")
        assert (again.id, again.created) == (first.id, False)
        time.sleep(0.1)
    _, report = idle.judge(RUNNING)
    assert report.violations == []
    assert report.finals == {"queued": report.jobs}
    assert idle.mid_audits


def test_what_waits_is_flagged_at_the_end(idle: Arena) -> None:
    idle.producer().bulk("QUICK", 3)
    _, report = idle.judge(Limits())
    assert {violation.inv for violation in report.violations} == {16, 22} - {22}


def test_lost_frame_is_flagged(idle: Arena) -> None:
    idle.producer().bulk("QUICK", 3)
    idle.direct.delete("tq:{0}:queue:normal")
    _, report = idle.judge(RUNNING)
    assert {violation.inv for violation in report.violations} == {1}


def test_submissions_over_killed_servers_are_kept_or_unknown(idle: Arena) -> None:
    with idle.load(1_500, backlog=1 << 40, pause_s=0.005) as producer:
        for _ in range(3):
            time.sleep(0.1)
            idle.redis_faults.kill(0.1)
    _, report = idle.judge(RUNNING)
    assert report.violations == [], str(report)
    assert report.jobs >= producer.count - producer.unknown
