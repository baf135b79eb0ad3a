"""Submits jobs from Python and waits for their results; run `tqe run` beside it."""

from examples.quickstart import app, greet


def main() -> None:
    """One job, a job with options, and ten thousand at once."""
    print(greet.submit(name="Ann").result(timeout=10))
    quarter = app.submit("DIVIDE", {"a": 1, "b": 4}, priority="high", idempotency_key="quarter")
    print(quarter.result(timeout=10))
    jobs = greet.submit_many([{"name": f"No. {n}"} for n in range(10_000)])
    print(f"{jobs.created} jobs created; the last one says: {jobs[-1].result(timeout=30)}")


if __name__ == "__main__":
    main()
