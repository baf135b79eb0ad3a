"""Training, the gate and the evaluation on made traces."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from tests.ml import made
from tests.ml.conftest import AT
from tqe.ml import ModelError, evaluate, gate, simulate, trainer
from tqe.ml.dataset import Facts, Record, Trace, collect
from tqe.ml.train import fit


def uniform(jobs: int = 1500) -> list[Record]:
    """Nothing to predict: durations have nothing to do with anything."""
    return [
        Record(facts, at, 1.0 + (i * 7919 % 101) / 1000)
        for i, (facts, at, *_) in enumerate(made.records(jobs))
    ]


def test_a_model_is_chosen_where_it_orders_better(published) -> None:  # type: ignore[no-untyped-def]
    found = published.manifest.gate
    assert found["mean_s"]["model"] < found["mean_s"]["hierarchical_mean"] < found["mean_s"]["fifo"]
    assert "model beats hierarchical_mean" in found["reason"]
    assert published.manifest.bound_s > 0 and published.manifest.floor > 0.2


def test_the_mean_is_chosen_where_a_model_wins_nothing() -> None:
    """Durations that depend on type and user alone: the history says it all."""
    lines = [
        Record(f, at, {"A": 1.0, "B": 3.0, "C": 9.0, "D": 27.0}[f.type]) for f, at, *_ in made.records(2000)
    ]
    judged = trainer.judge(collect("t", lines, numeric=("size",), categorical=("user",)), servers=4)
    assert judged.verdict.chosen == "hierarchical_mean"
    assert judged.bound("hierarchical_mean").bound_factor > 0


def test_fifo_is_chosen_where_nothing_can_be_predicted() -> None:
    judged = trainer.judge(collect("t", uniform(), numeric=("size",), categorical=("user",)), servers=4)
    assert judged.verdict.chosen == "fifo" and "does not beat fifo" in judged.verdict.reason


def test_too_few_jobs_make_no_model_and_say_so() -> None:
    fitted = fit(made.trace(100))
    assert fitted.model is None and "too few" in fitted.reason
    verdict = gate.choose([0.0] * 50, [1.0] * 50, {"hierarchical_mean": [1.0] * 50}, servers=2, scale_s=1.0)
    assert verdict.chosen == "fifo" and "too few" in verdict.reason


def test_a_gate_passes_no_poisoned_model() -> None:
    trace = made.trace(1500)
    exact = list(trace.duration_s)
    inverted = [1.0 / s for s in exact]
    verdict = gate.choose(
        trace.submit_s, exact, {"hierarchical_mean": exact, "model": inverted}, servers=4, scale_s=1.0
    )
    assert verdict.chosen == "hierarchical_mean"
    verdict = gate.choose(trace.submit_s, exact, {"model": inverted}, servers=4, scale_s=1.0)
    assert verdict.chosen == "fifo" and len(verdict.blocks) == gate.BLOCKS
    choice = gate.choose_bound(trace.submit_s, exact, inverted, exact, servers=4, scale_s=1.0)
    assert choice.bound_factor == 0.0


def test_a_win_on_one_block_alone_is_no_win() -> None:
    """Good predictions in the first half, inverted ones in the second."""
    trace = made.trace(2000)
    exact = list(trace.duration_s)
    half = len(exact) // 2
    later = [1.0 / s if i % 3 else s for i, s in enumerate(exact[half:])]
    verdict = gate.choose(trace.submit_s, exact, {"model": [*exact[:half], *later]}, servers=4, scale_s=1.0)
    gains = [1.0 - block["model"] / block["fifo"] for block in verdict.blocks]
    assert gains[0] > 0.1 and gains[1] < -gate.GAIN_MIN and sum(gains) / 2 > gate.GAIN_MIN
    assert verdict.chosen == "fifo"


@pytest.mark.parametrize("allowance", ["P95_MAX", "P99_MAX", "WORST_MAX"])
def test_each_allowance_of_the_tail_limits_t(monkeypatch: pytest.MonkeyPatch, allowance: str) -> None:
    trace = made.trace(2000)
    exact = list(trace.duration_s)

    def factor() -> float:
        return gate.choose_bound(trace.submit_s, exact, exact, exact, servers=4, scale_s=1.0).bound_factor

    assert factor() > 0
    monkeypatch.setattr(gate, allowance, -10.0)
    assert factor() == 0.0


def test_one_lucky_t_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {2.0: 0.3, 1.5: 0.2, 1.25: 0.1, 1.0: 0.05}
    monkeypatch.setattr(gate, "_gain", lambda spans, factor, scale_s: kept.get(factor))
    trace = made.trace(1000)
    columns = (trace.submit_s, trace.duration_s, trace.duration_s, trace.duration_s)
    assert gate.choose_bound(*columns, servers=4, scale_s=1.0).bound_factor == 1.5


def test_a_trace_of_nothing_but_the_same_moment_can_be_judged() -> None:
    lines = [Record(f, 0.0, s) for f, _, s, _ in made.records(1200)]
    report, _ = evaluate.evaluate(
        collect("burst", lines, numeric=("size",), categorical=("user",)), servers=4
    )
    assert report["chosen"] == "fifo"  # nothing had completed when they came: nothing was known
    assert all(math.isfinite(v) for found in report["loads"]["0.9"].values() for v in found.values())


# --- the report that others' scripts read ---


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return evaluate.evaluate(made.trace(3000), servers=8, loads=(0.7, 0.95))[0]


def test_the_report_has_the_promised_shape(report) -> None:  # type: ignore[no-untyped-def]
    assert list(report) == ["trace", "servers", "chosen", "loads"]
    assert report["trace"] == "made" and report["servers"] == 8
    assert report["chosen"] in ("model", "hierarchical_mean", "type_mean", "fifo")
    assert list(report["loads"]) == ["0.7", "0.95"]
    for policies in report["loads"].values():
        assert set(policies) == {
            "fifo",
            "sjf_oracle",
            "sjf_model",
            "sjf_hierarchical_mean",
            "sjf_type_mean",
            "bounded",
            "bounded_chosen",
            "bounded_fixed",
        }
        for found in policies.values():
            assert {
                "mean_s", "p50_s", "p95_s", "p99_s", "max_s",
                "mean_vs_fifo", "p95_vs_fifo", "p99_vs_fifo", "max_vs_fifo", "share_of_oracle",
            } <= set(found)  # fmt: skip
    assert json.loads(json.dumps(report)) == report


def test_the_report_says_what_it_should(report) -> None:  # type: ignore[no-untyped-def]
    assert report["chosen"] == "model"
    for policies in report["loads"].values():
        fifo, oracle, by_model = policies["fifo"], policies["sjf_oracle"], policies["sjf_model"]
        assert fifo["mean_vs_fifo"] == fifo["share_of_oracle"] == 0.0 and oracle["share_of_oracle"] == 1.0
        assert by_model["share_of_oracle"] > 0.9 > policies["sjf_type_mean"]["share_of_oracle"]
        assert policies["bounded"] == policies["bounded_chosen"]
        assert policies["bounded"]["share_of_oracle"] > 0.2
        assert policies["bounded"]["p99_vs_fifo"] <= 0.08 and policies["bounded"]["max_vs_fifo"] <= 0.25
        assert by_model["mean_vs_fifo"] == pytest.approx(by_model["mean_s"] / fifo["mean_s"] - 1, abs=1e-4)


def test_the_fixed_bound_is_the_one_that_would_be_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """One T for all jobs, whatever the backlog; and where the gate wants FIFO, FIFO."""
    asked: list[tuple[str, float]] = []

    class Spy(evaluate.Bound):
        __slots__ = ()

        def arrived(self, backlog_s: float) -> float:
            asked.append(("fixed" if self._jobs == math.inf else "follows", super().arrived(backlog_s)))
            return asked[-1][1]

    monkeypatch.setattr(evaluate, "Bound", Spy)
    trace = made.trace(3000)
    found = evaluate.evaluate(trace, servers=8, loads=(0.9,))[0]["loads"]["0.9"]
    fixed = {bound_s for kind, bound_s in asked if kind == "fixed"}
    assert len(fixed) == 1 and len({bound_s for kind, bound_s in asked if kind == "follows"}) > 100
    assert found["bounded_fixed"]["mean_vs_fifo"] < 0
    judged = evaluate.judge(trace.part(0, 1800), servers=8)
    arrive_s = evaluate.stretched(trace.submit_s[:1800], trace.duration_s[:1800], 8, 0.9)
    published_s = judged.bound("model", (0.9, trainer.BUSY_LOAD)).bound_factor * evaluate.fifo_wait_s(
        arrive_s, trace.duration_s[:1800], 8
    )
    assert fixed.pop() == pytest.approx(published_s)


def test_the_report_is_the_same_each_time(report) -> None:  # type: ignore[no-untyped-def]
    assert evaluate.evaluate(made.trace(3000), servers=8, loads=(0.7, 0.95))[0] == report


def test_what_if_answers_for_each_number_of_servers() -> None:
    trace = made.trace(3000, gap_s=0.4)
    found = evaluate.what_if(trace, servers=(4, 40), modes=("fifo", "bounded", "sjf"), bound_s=5.0)
    few, many = found["servers"]
    assert few["load"] == pytest.approx(10 * many["load"], rel=1e-4)
    assert few["predictor"] == "model"
    assert few["modes"]["sjf"]["mean_s"] < few["modes"]["bounded"]["mean_s"] < few["modes"]["fifo"]["mean_s"]
    assert many["modes"]["fifo"]["mean_wait_s"] < 0.1 * few["modes"]["fifo"]["mean_wait_s"]


def test_a_handful_of_jobs_is_refused() -> None:
    with pytest.raises(ModelError, match="too few"):
        evaluate.evaluate(made.trace(2))


def test_without_the_extra_training_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightgbm", None)
    with pytest.raises(ModelError, match=r'pip install "tqe\[ml\]"'):
        trainer.publish(made.trace(600), tmp_path, servers=4, trained_at=AT)


def test_a_type_that_nobody_has_seen_is_ordered_by_the_mean_of_all() -> None:
    lines = made.records(1500)
    lines += [
        Record(Facts("NEW", fields={"user": "zoe", "size": 1.0}), lines[-1].submit_s + i, 2.0)
        for i in range(900)
    ]
    report, _ = evaluate.evaluate(
        collect("t", lines, numeric=("size",), categorical=("user",)), servers=4, loads=(0.9,)
    )
    assert all(math.isfinite(v) for found in report["loads"]["0.9"].values() for v in found.values())


# --- T


def busy(jobs: int = 8000) -> tuple[list[float], list[float]]:
    """Arrivals and durations of jobs of about 20 ms that keep four servers busy for 90 % of the time."""
    draw = random.Random(11)
    duration_s = [draw.lognormvariate(-4.3, 0.8) for _ in range(jobs)]
    gaps_s = (draw.expovariate(1.0) * (20.0 if draw.random() < 0.05 else 0.1) for _ in range(jobs))
    at_s = list(itertools.accumulate(gaps_s))
    return simulate.stretched(at_s, duration_s, 4, 0.9), duration_s


def thinned(arrive_s: list[float], duration_s: list[float], start_s: list[float], *, waits: bool) -> Trace:
    """What workers that capture one job in twenty leave of it."""
    rows = list(zip(arrive_s, duration_s, start_s, strict=True))
    return collect(
        "t",
        [
            Record(Facts("A"), at_s, run_s, began_s - at_s if waits else math.nan)
            for at_s, run_s, began_s in rows[::20]
        ],
    )


@pytest.mark.parametrize("order", ["fifo", "sjf"])
def test_a_thinned_trace_gives_the_wait_of_the_traffic(order: str) -> None:
    """Also where the waits were measured under an order that had made them shorter."""
    arrive_s, duration_s = busy()
    policy = simulate.Fifo() if order == "fifo" else simulate.Fixed(duration_s)
    trace = thinned(arrive_s, duration_s, simulate.replay(arrive_s, duration_s, 4, policy), waits=True)
    truth_s = simulate.fifo_wait_s(arrive_s, duration_s, 4)
    assert simulate.fifo_wait_s(trace.submit_s, trace.duration_s, 4) < truth_s / 5, (
        "a replay of it says nothing"
    )
    found_s, said = trainer.fifo_wait(trace, 4)
    assert truth_s * 0.8 < found_s < truth_s * 1.25 and "measured" in said
    assert trainer.fifo_wait(trace, 40)[0] == found_s, "and a wrong number of servers is no matter"


def test_without_waits_a_log_that_leaves_the_servers_idle_is_replayed_at_a_busy_load() -> None:
    arrive_s, duration_s = busy()
    truth_s = simulate.fifo_wait_s(arrive_s, duration_s, 4)
    part = thinned(arrive_s, duration_s, arrive_s, waits=False)
    found_s, said = trainer.fifo_wait(part, 4)
    as_came_s = simulate.fifo_wait_s(part.submit_s, part.duration_s, 4)
    assert found_s > 2 * as_came_s and "busy for only" in said
    whole = collect("t", [Record(Facts("A"), at, run) for at, run in zip(arrive_s, duration_s, strict=True)])
    assert trainer.fifo_wait(whole, 4) == (pytest.approx(truth_s), "from a replay of the log")


def test_no_T_is_published_below_the_wait_for_a_busy_server() -> None:
    """Jobs that never meet, at any load: a T of 0 would order nothing when a backlog comes."""
    alone = collect("t", [Record(Facts("A"), float(at), 0.9) for at in range(300)])
    found_s, said = trainer.fifo_wait(alone, 1)
    assert found_s == pytest.approx(0.9) and "for each server" in said
