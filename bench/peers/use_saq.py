"""SAQ on uvloop."""

import time

import common
import uvloop
from saq import Queue

uvloop.install()
queue = Queue.from_url(common.URL)


async def noop(context, *, payload):
    common.done()


async def timed(context, *, sent_ns, number):
    common.timed(sent_ns, number)


settings = {"queue": queue, "functions": [noop, timed], "concurrency": 100}


async def submit_all(jobs):
    await common.side_by_side(lambda number: queue.enqueue("noop", payload=common.payload(number)), jobs)


async def submit_timed(number):
    await queue.enqueue("timed", sent_ns=time.monotonic_ns(), number=number)


if __name__ == "__main__":
    common.main(submit_all, submit_timed, queue.connect)
