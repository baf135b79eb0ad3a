"""Ardiq on uvloop."""

import time

import common
import uvloop
from ardiq import Ardiq

uvloop.install()
app = Ardiq(redis_url=common.URL, queue_name="bench", concurrency=512, prefetch=512)


@app.task()
async def noop(payload):
    common.done()


@app.task()
async def timed(sent_ns, number):
    common.timed(sent_ns, number)


async def submit_all(jobs):
    for numbers in common.chunks(jobs):
        await app.enqueue_many([noop.prepare(common.payload(number)) for number in numbers])


async def submit_timed(number):
    await timed.enqueue(time.monotonic_ns(), number)


if __name__ == "__main__":
    import use_ardiq  # tasks are known by the module that they were imported as

    common.main(use_ardiq.submit_all, use_ardiq.submit_timed)
