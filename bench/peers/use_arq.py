"""Arq on uvloop, polling a hundred times a second."""

import time

import common
import uvloop
from arq import create_pool
from arq.connections import RedisSettings

uvloop.install()
pool = None


async def noop(context, payload):
    common.done()


async def timed(context, sent_ns, number):
    common.timed(sent_ns, number)


class WorkerSettings:
    functions = [noop, timed]  # noqa: RUF012
    redis_settings = RedisSettings.from_dsn(common.URL)
    max_jobs = 200
    poll_delay = 0.01
    log_results = False


async def connect():
    global pool
    pool = await create_pool(WorkerSettings.redis_settings)


async def submit_all(jobs):
    await common.side_by_side(lambda number: pool.enqueue_job("noop", common.payload(number)), jobs)


async def submit_timed(number):
    await pool.enqueue_job("timed", time.monotonic_ns(), number)


if __name__ == "__main__":
    common.main(submit_all, submit_timed, connect)
