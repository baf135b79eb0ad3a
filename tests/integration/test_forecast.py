"""What is said beforehand of a job: only what was measured, and null where nothing was."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis

from tests.support.cli import Cli
from tests.support.hands import Hands
from tests.support.predictors import Told
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe import codec
from tqe.board.board import Board
from tqe.client import AsyncClient, Client
from tqe.settings import Settings
from tqe.store import forecast as forecasting
from tqe.store import model, settling
from tqe.store.forecast import Forecast
from tqe.store.keys import Keys
from tqe.worker.admission import Admission
from tqe.worker.ordering import Ordering

KEYS = Keys()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(Settings(redis_url=redis_server.url)) as client:
        yield client


@pytest.fixture
def measured(redis_client: redis.Redis) -> redis.Redis:
    """Types that were timed, and two workers."""
    redis_client.hset(KEYS.means, mapping={"SHORT": 20_000, "LONG": 3_000_000})
    redis_client.zadd(KEYS.incarnations, {"one": 2e12, "two": 2e12})
    return redis_client


def test_a_wait_is_the_work_before_it_shared_by_the_workers(client: Client, measured: redis.Redis) -> None:
    client.submit_alike("LONG", [{}] * 4, priority="high")
    client.submit_alike("LONG", [{}] * 2, priority="low")
    client.submit_alike("SHORT", [{}] * 99)
    entered_s = measured.time()
    wait_until(lambda: measured.time() > (entered_s[0], entered_s[1] + 200_000))  # later, by any clock
    last = client.submit("SHORT", {})
    run_ms, wait_ms = last.forecast()
    assert run_ms == 20
    assert wait_ms == pytest.approx((4 * 3_000 + 100 * 20) / 2, abs=300), "the low lane comes later"


def test_who_entered_first_waits_for_higher_lanes_alone(client: Client, measured: redis.Redis) -> None:
    first = client.submit("LONG", {})
    entered_s = measured.time()
    wait_until(lambda: measured.time() > (entered_s[0], entered_s[1] + 20_000))
    client.submit("LONG", {})
    _, wait_ms = first.forecast()
    assert wait_ms is not None and wait_ms < 3_000, "half of the lane at the most"


def scored(measured: redis.Redis, seconds: Sequence[float]) -> None:
    """A worker comes, predicts so much of the jobs that wait, in their order, and gives them back."""
    order = model.Order("v", "", 10**9, 10**7, {"normal": "bounded"})
    measured.hset(KEYS.model, mapping={"version": "v", "bound_us": order.bound_us, "mean_us": order.mean_us})
    hands, batch, left = Hands(measured), settling.SettleBatch(), iter(seconds)
    for lease, frame in hands.fetch().leases.items():
        header = codec.parse(frame)
        parts: list[bytes] = []
        for index in range(header.base, header.base + header.n):
            boost_us = int(order.likely_boost_us("normal", next(left)))
            parts += codec.cut(frame, [(index, 1)], boost_us=boost_us, flags=header.flags | codec.SCORED)
        batch.add(settling.returned(lease, parts))
    for made in batch.calls(KEYS, hands.incarnation, result_ttl_s=60, dlq_max=100):
        assert set(hands.door.run(made.call)[1]) == {ord("1")}
    measured.zrem(KEYS.incarnations, hands.incarnation)


def test_a_scored_job_runs_as_predicted_and_waits_by_its_place(client: Client, measured: redis.Redis) -> None:
    jobs = client.submit_many([("LONG", {})] * 100)
    seconds = [(at * 37 % 100 + 1) / 10 for at in range(100)]
    scored(measured, seconds)
    for at in (0, 1, 50, 63, 99):
        run_ms, wait_ms = jobs[at].forecast()
        assert run_ms == pytest.approx(1000 * seconds[at], abs=2)
        before_s = sum(one for one in seconds if one < seconds[at])
        assert wait_ms == pytest.approx(1000 * before_s / 2, abs=60), "two workers share what goes first"
    late = client.submit("SHORT", {})
    run_ms, wait_ms = late.forecast()
    assert run_ms == 20 and wait_ms is not None and wait_ms < 100, "its type says so"
    client.submit("LONG", {})
    assert late.forecast().predicted_wait_ms == pytest.approx(0, abs=20), "who came later waits"


def test_a_job_is_looked_for_page_by_page_and_only_in_a_part_of_some_size(
    client: Client, measured: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = client.submit_many([("LONG", {})] * 300)
    seconds = [0.1 + at / 100 for at in range(300)]
    scored(measured, seconds)
    monkeypatch.setattr(forecasting, "SEARCH_PAGE", 10)
    assert [jobs[at].forecast().predicted_ms for at in (0, 150, 299)] == [100, 1_600, 3_090]
    monkeypatch.setattr(forecasting, "SEARCH_JOBS_MAX", 299)
    run_ms, wait_ms = jobs[0].forecast()
    assert run_ms == 3_000, "the mean of its type"
    before_s = sum(one for one in seconds if one < 3.0)
    assert wait_ms == pytest.approx(1000 * before_s / 2, rel=0.1), "and the place that goes with it"


@pytest.mark.parametrize("mode", ["bounded", "sjf"])
def test_workers_and_forecasts_read_the_same_from_a_boost(mode: model.Mode) -> None:
    ordering = Ordering(Told(), Board(1).slots[0], {}, Admission({}, quantum_ns=1), 1)
    order = model.Order("v", "00", 10**7, 10**6, {"normal": mode})
    ordering.follow(order)
    boost_us = int(order.likely_boost_us("normal", 2.5))
    assert order.predicted_s("normal", boost_us) == ordering.predicted_s("normal", boost_us)
    assert order.predicted_s("normal", boost_us) == pytest.approx(2.5, rel=0.01)


def test_without_an_order_scores_of_before_say_no_run_time(client: Client, measured: redis.Redis) -> None:
    jobs = client.submit_many([("LONG", {})] * 3)
    scored(measured, [30.0, 20.0, 10.0])
    measured.hset(KEYS.model, "mode:normal", "fifo")
    assert [job.forecast().predicted_ms for job in jobs] == [3_000] * 3
    assert [job.forecast().predicted_wait_ms for job in jobs] == [3_000, 1_500, 0], "their places hold"


def test_nothing_is_said_where_nothing_is_known(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("SHORT", {})
    assert job.forecast() == Forecast(None, None)
    redis_client.hset(KEYS.means, mapping={"SHORT": 20_000})
    assert job.forecast() == Forecast(20, None), "no worker lives"
    redis_client.zadd(KEYS.incarnations, {"one": 2e12})
    assert job.forecast().predicted_wait_ms is not None
    assert client.submit("NEW", {}).forecast().predicted_ms is None
    assert client.submit("SHORT", {}, delay=60).forecast() == Forecast(20, None)
    client.pause("normal")
    assert job.forecast() == Forecast(20, None)


def test_a_job_that_has_ended_has_no_forecast(client: Client, measured: redis.Redis) -> None:
    job = client.submit("SHORT", {})
    Hands(measured).fetch().settle(lambda one: ("C", 1))
    assert job.forecast() == Forecast()
    assert client.forecast("01JD8Z3V7Q8K2M4N6P8R0T2W00.0") == Forecast()


async def test_asyncio_says_the_same(redis_server: RedisServer, measured: redis.Redis) -> None:
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        job = await client.submit("SHORT", {})
        assert await job.forecast() == Forecast(20, 10)


def test_tqe_job_shows_it(redis_server: RedisServer, tmp_path: Path, measured: redis.Redis) -> None:
    cli = Cli({"TQE_REDIS_URL": redis_server.url})
    name = cli.json("submit", "LONG")["id"]
    told = cli.json("job", name)
    assert (told["predicted_ms"], told["predicted_wait_ms"]) == (3_000, 1_500)
    said = cli("job", name).stdout
    assert "runs for about   3.0 s" in said and "starts in about  1.5 s" in said
    Hands(measured).fetch().settle(lambda one: ("C", 1))
    told = cli.json("job", name)
    assert (told["predicted_ms"], told["predicted_wait_ms"]) == (None, None)
    assert "about" not in cli("job", name).stdout


def test_tqe_submit_tells_it_when_asked(redis_server: RedisServer, measured: redis.Redis) -> None:
    cli = Cli({"TQE_REDIS_URL": redis_server.url})
    told = cli.json("submit", "LONG", "--predict")
    assert (told["predicted_ms"], told["predicted_wait_ms"]) == (3_000, 1_500)
    assert cli.json("submit", "NEW", "--predict")["predicted_ms"] is None
    assert set(cli.json("submit", "LONG")) == {"id", "created"}
    said = cli("submit", "LONG", "--predict")
    assert said.stdout.count("\n") == 1, "the id alone: scripts read it"
    assert "runs for about 3.0 s" in said.stderr
