"""Blitzq in its reliable mode, without results."""

import time

import common
from blitzq import Queue

queue = Queue("default", redis_url=common.URL, mode="reliable", store_results=False)


@queue.task
async def noop(payload: dict) -> None:
    common.done()


@queue.task
async def timed(sent_ns: int, number: int) -> None:
    common.timed(sent_ns, number)


async def submit_all(jobs):
    for numbers in common.chunks(jobs):
        await noop.enqueue_many([(common.payload(number),) for number in numbers])


async def submit_timed(number):
    await timed.enqueue(time.monotonic_ns(), number)


if __name__ == "__main__":
    import use_blitzq  # tasks are known by the module that they were imported as

    common.main(use_blitzq.submit_all, use_blitzq.submit_timed)
