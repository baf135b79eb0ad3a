"""Dramatiq on Redis, default middleware, no results."""

import time

import common
import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=common.URL))


@dramatiq.actor
def noop(payload):
    common.done()


@dramatiq.actor
def timed(sent_ns, number):
    common.timed(sent_ns, number)


def submit_all(jobs):
    for number in range(jobs):
        noop.send(common.payload(number))


if __name__ == "__main__":
    common.main(submit_all, lambda number: timed.send(time.monotonic_ns(), number))
