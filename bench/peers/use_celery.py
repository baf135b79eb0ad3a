"""Celery on Redis: JSON, late acknowledgement, no result backend."""

import time

import common
from celery import Celery

app = Celery("use_celery", broker=common.URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=True,
    task_serializer="json",
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=64,
    worker_send_task_events=False,
)


@app.task(name="noop")
def noop(payload):
    common.done()


@app.task(name="timed")
def timed(sent_ns, number):
    common.timed(sent_ns, number)


def submit_all(jobs):
    with app.producer_or_acquire() as producer:
        for number in range(jobs):
            noop.apply_async((common.payload(number),), producer=producer)


if __name__ == "__main__":
    common.main(submit_all, lambda number: timed.delay(time.monotonic_ns(), number))
