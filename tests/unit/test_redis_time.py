"""The estimate of Redis' clock: never ahead of it, close to it, and given up when it may be wrong."""

import random

import pytest

from tests.support.fake_clock import FakeClock
from tqe.store.redis_time import RedisTime

START_US = 1_700_000_000_000_000


def test_nothing_is_known_before_a_reply(fake_clock: FakeClock) -> None:
    time = RedisTime(fake_clock)
    assert time.now_us() == 0
    time.heard(START_US)
    assert time.now_us() == START_US


def test_it_runs_on_a_little_slower_than_our_clock(fake_clock: FakeClock) -> None:
    time = RedisTime(fake_clock)
    time.heard(START_US)
    fake_clock.advance(ms=500)
    assert time.now_us() == START_US + 499_500


def test_what_is_old_is_forgotten(fake_clock: FakeClock) -> None:
    time = RedisTime(fake_clock)
    time.heard(START_US)
    fake_clock.advance(ms=999)
    assert time.now_us() > START_US
    fake_clock.advance(ms=1)
    assert time.now_us() == 0


def test_a_reply_that_was_read_late_does_not_make_it_worse(fake_clock: FakeClock) -> None:
    time = RedisTime(fake_clock)
    time.heard(START_US)
    fake_clock.advance(ms=100)
    time.heard(START_US + 50_000)  # it waited in the socket for 50 ms
    assert time.now_us() == START_US + 99_900
    time.heard(START_US + 100_000)
    assert time.now_us() == START_US + 100_000


def test_a_clock_that_was_set_back_is_believed_after_a_second_at_the_latest(fake_clock: FakeClock) -> None:
    time = RedisTime(fake_clock)
    time.heard(START_US)
    for _ in range(10):
        fake_clock.advance(ms=100)
        time.heard(START_US - 60_000_000)
    assert time.now_us() == START_US - 60_000_000


@pytest.mark.parametrize("drift_ppm", [-1_000, -500, 0, 500])
def test_it_is_never_ahead_of_redis(fake_clock: FakeClock, drift_ppm: int) -> None:
    """Redis' clock is up to 0.1 % slower than ours, replies take 0 to 20 ms, and are read late."""
    seeded = random.Random(drift_ppm)
    time = RedisTime(fake_clock)
    redis_us = float(START_US)

    def passes(seconds: float) -> None:
        nonlocal redis_us
        fake_clock.advance(us=int(seconds * 1e6))
        redis_us += int(seconds * 1e6) * (1 + drift_ppm / 1e6)

    known = 0
    for _ in range(2_000):
        said_us = int(redis_us)
        passes(seeded.choice([0.0, seeded.uniform(0, 0.02)]))
        time.heard(said_us)
        passes(seeded.choice([0.0, seeded.uniform(0, 0.01), seeded.uniform(0, 1.2)]))
        known += time.now_us() > 0
        assert time.now_us() <= redis_us + 1  # both are rounded
        assert time.now_us() == 0 or time.now_us() > redis_us - 25_000
    assert known > 1_000
