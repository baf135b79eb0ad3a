"""Huey on Redis with process workers."""

import time

import common
from huey import RedisHuey

huey = RedisHuey("bench", url=common.URL)


@huey.task()
def noop(payload):
    common.done()


@huey.task()
def timed(sent_ns, number):
    common.timed(sent_ns, number)


def submit_all(jobs):
    for number in range(jobs):
        noop(common.payload(number))


if __name__ == "__main__":
    import use_huey  # tasks are known by the module that they were imported as

    common.main(use_huey.submit_all, lambda number: use_huey.timed(time.monotonic_ns(), number))
