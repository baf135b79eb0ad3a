"""Streaq on asyncio with uvloop."""

import time

import common
from streaq import Worker

worker = Worker(
    redis_url=common.URL,
    queue_name="bench",
    concurrency=32,
    prefetch=256,
    anyio_backend="asyncio",
    anyio_kwargs={"use_uvloop": True},
)


@worker.task(silent=True)
async def noop(payload: dict) -> None:
    common.done()


@worker.task(silent=True)
async def timed(sent_ns: int, number: int) -> None:
    common.timed(sent_ns, number)


async def submit_all(jobs):
    for numbers in common.chunks(jobs):
        await worker.enqueue_many([noop.enqueue(common.payload(number)) for number in numbers])


async def submit_timed(number):
    await timed.enqueue(time.monotonic_ns(), number)


if __name__ == "__main__":
    import use_streaq  # tasks are known by the module that they were imported as

    common.main(use_streaq.submit_all, use_streaq.submit_timed, use_streaq.worker.__aenter__)
