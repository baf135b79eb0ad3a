"""RQ: `use_rq.py work Worker|SimpleWorker` is its worker, with the tasks imported before it forks."""

import sys
import time

import common
import redis
import rq

connection = redis.Redis.from_url(common.URL)
queue = rq.Queue("default", connection=connection)


def noop(payload):
    common.done()


def timed(sent_ns, number):
    common.timed(sent_ns, number)


def submit_all(jobs):
    for numbers in common.chunks(jobs):
        queue.enqueue_many(
            [rq.Queue.prepare_data("use_rq.noop", (common.payload(number),)) for number in numbers]
        )


if __name__ == "__main__":
    if sys.argv[1] == "work":
        import use_rq  # the tasks under the name that jobs call them by

        worker = getattr(rq, sys.argv[2])([use_rq.queue], connection=connection, log_job_description=False)
        worker.work(logging_level="ERROR")
    else:
        common.main(submit_all, lambda number: queue.enqueue("use_rq.timed", time.monotonic_ns(), number))
