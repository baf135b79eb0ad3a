"""Taskiq on a Redis stream, which acknowledges."""

import time

import common
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(common.URL)


@broker.task(task_name="noop")
async def noop(payload: dict) -> None:
    common.done()


@broker.task(task_name="timed")
async def timed(sent_ns: int, number: int) -> None:
    common.timed(sent_ns, number)


async def submit_all(jobs):
    await common.side_by_side(lambda number: noop.kiq(common.payload(number)), jobs)


async def submit_timed(number):
    await timed.kiq(time.monotonic_ns(), number)


if __name__ == "__main__":
    common.main(submit_all, submit_timed, broker.startup)
