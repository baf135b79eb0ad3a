"""A sample that has something of everything, and the metrics that a page makes of it."""

from tqe.board import layout
from tqe.telemetry import metrics


def full_sample() -> metrics.Sample:
    """One of each: what a page can show, it shows of this."""
    task = metrics.TaskSample({"completed": 1}, [1] * layout.BINS, 0.1, [1] * layout.BINS, 0.1)
    return metrics.Sample(
        queue=metrics.QueueSample(lanes={"high": metrics.LaneSample(1, 1, backlog_s=1.0, mode="sjf")}),
        workers=[metrics.WorkerSample(0, "busy")],
        tasks={"EMAIL": task},
        scale_reason="backlog",
        duties={"renewal": metrics.DutySample(1, 0, 0.1)},
    )


def exposed() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name as in queries of Prometheus → (type, labels). Histograms and summaries without their suffixes."""
    found = {}
    for family in metrics.families(full_sample()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for one in family.samples for label in one.labels} - {"le"}
        found[name] = (family.type, tuple(sorted(labels)))
    return found
