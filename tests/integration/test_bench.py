"""`tqe bench` on small numbers: what it measures, what it says of the machine, what it calls a result."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tqe.bench import lab as lab_module
from tqe.bench import meters, suite, tasks
from tqe.bench.lab import Lab, RunFailed
from tqe.bench.ledger import Ledger
from tqe.bench.producing import bulk
from tqe.bench.scenario import Figure, Figures, Scenario
from tqe.cli import bench as command
from tqe.cli.main import main
from tqe.errors import SettingsError
from tqe.telemetry import procfs

# A fork of a process with the threads of a test runner is what it warns of; the tool itself has none.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def play(name: str, tmp_path: Path, scale: float = 0.005) -> tuple[Figures, Lab]:
    ledger = Ledger()
    lab = Lab(tmp_path, app=tasks.make_app(ledger), ledger=ledger, scale=scale, pulse=lambda part: None)
    return suite.SCENARIOS[name].play(lab), lab


def test_a_drain_gives_its_figures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(meters.children(os.getpid()))
    found, _ = play("drain", tmp_path)
    scenario = suite.SCENARIOS["drain"]
    assert set(found) == {figure.name for figure in scenario.figures}
    assert all(value > 0 for value in found.values())
    # Of 49 bytes of payload twice, plus headers, at least; a share of a floor cannot exceed it by far.
    assert found["payload_bytes"] == 49
    assert 2 * 49 < found["aof_bytes"] < 1_000
    assert 0 < found["floor_share"] < 1.5
    assert set(meters.children(os.getpid())) <= before
    assert list(tmp_path.iterdir()) == []


def test_latencies_come_from_every_job_and_from_one_clock(tmp_path: Path) -> None:
    found, lab = play("latency", tmp_path)
    assert 0 < found["p50"] <= found["p99"] < 10_000
    assert len(lab.ledger.values(0, 100)) == 70  # 20 of a full run at this scale, and the warm-up


# Each of them in campaigns; in every test run those that need a second or two.
CHEAP = ("board", "singles", "retries", "priority")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in CHEAP else pytest.mark.campaign) for name in suite.SCENARIOS],
)
def test_each_scenario_gives_each_of_its_figures(name: str, tmp_path: Path) -> None:
    found, _ = play(name, tmp_path, scale=0.002)
    assert set(found) == {figure.name for figure in suite.SCENARIOS[name].figures}
    assert all(math.isfinite(value) for value in found.values()), found


def test_a_producer_that_fails_fails_the_run(tmp_path: Path) -> None:
    ledger = Ledger()
    lab = Lab(tmp_path, app=tasks.make_app(ledger), ledger=ledger, scale=1, pulse=lambda part: None)
    with lab.stage() as stage, pytest.raises(RunFailed, match="lane"):
        stage.produce(bulk(10, lane="nowhere"))


def test_jobs_that_never_end_fail_the_run_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_module, "PATIENCE_S", 0.5)
    ledger = Ledger()
    lab = Lab(tmp_path, app=tasks.make_app(ledger), ledger=ledger, scale=1, pulse=lambda part: None)
    with lab.stage() as stage:
        monkeypatch.setattr(lab_module, "PATIENCE_S", 30.0)
        stage.start()
        monkeypatch.setattr(lab_module, "PATIENCE_S", 0.5)
        with pytest.raises(RunFailed, match="0 of 1 jobs"):
            stage.wait_for(1)
        pid = stage.server.pid
    assert procfs.state(pid) in ("", "Z")


# ------------------------------------------------------------------ what is made of runs


def made_up(
    values: Sequence[float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    runs: int = suite.RUNS,
    quick: bool = False,
    foreign: Sequence[float] = (),
    **figure: Any,
) -> dict[str, Any]:
    """A session of one scenario whose figure is given, on a machine that is silent, but for `foreign`: what
    others used of it, a run."""
    left, others = list(values), list(foreign)
    one = Figure(**{"name": "rate", "unit": "jobs/s", "label": "made up", "more": True, **figure})

    def once(lab: Lab) -> Figures:
        lab.foreign += [others.pop(0)] if others else []
        return {"rate": left.pop(0)}

    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return suite.run([Scenario(name="made-up", what="-", figures=(one,), play=once)], runs=runs, quick=quick)


def the_figure(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["scenarios"]["made-up"]["figures"]["rate"]
    return found


def test_a_quiet_session_is_a_result_and_is_held_against_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up([100, 101, 99, 100, 103], monkeypatch, mark=99)
    figure = the_figure(result)
    assert result["verdict"] == "result" and result["noise"] == []
    assert (figure["median"], figure["min"], figure["max"], figure["judged"]) == (100, 99, 103, "met")
    assert figure["spread"] == 0.04


@pytest.mark.parametrize(
    ("values", "more", "said"),
    [
        ([99.0] * 5, True, "missed"),
        ([99.0] * 5, False, "met"),
        ([101.0] * 5, False, "missed"),
        ([99, 100, 101, 99, 100], True, "met by 3 of 5"),
        ([900, 901, 902, 903, 99], True, "met by 4 of 5"),
        ([100.0] * 4, True, "not judged: 4 of 5 runs"),
    ],
)
def test_a_mark_is_judged_by_each_of_its_runs(
    monkeypatch: pytest.MonkeyPatch, values: list[float], more: bool, said: str
) -> None:
    result = made_up(values, monkeypatch, mark=100, more=more, runs=len(values))
    assert the_figure(result)["judged"] == said


def test_without_a_mark_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert the_figure(made_up([100.0] * 5, monkeypatch))["judged"] is None


def test_a_quick_look_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up([100.0] * 5, monkeypatch, mark=100, quick=True)
    assert result["verdict"] == "quick" and the_figure(result)["judged"] == "not judged: quick"


def test_a_wide_spread_of_a_figure_with_a_mark_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [100, 80, 100, 100, 100]
    result = made_up(wide, monkeypatch, mark=70)
    assert result["verdict"] == "noisy" and "made up spreads over 20%" in result["noise"][0]
    assert the_figure(result)["judged"] == "met"  # the worst run meets it
    assert made_up(wide, monkeypatch, mark=70, steady=False)["verdict"] == "result"
    assert made_up(wide, monkeypatch)["verdict"] == "result"


def test_a_loaded_machine_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up([100.0] * 5, monkeypatch)
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 0.0, 0.0))
    scenario = Scenario(name="made-up", what="-", figures=(), play=lambda lab: {})
    result = suite.run([scenario])
    assert result["verdict"] == "noisy" and "load average was 50.0" in result["noise"][0]


def test_other_programs_during_a_run_leave_its_marks_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up([100.0] * 5, monkeypatch, mark=100, foreign=[0, 0, 0.2, 0, 0])
    assert result["verdict"] == "noisy"
    assert "up to 20% of the machine during runs of made-up" in result["noise"][0]
    assert the_figure(result)["judged"] == "not judged: 20% foreign use"


def test_the_table_says_of_marks_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for foreign, said in (((), "met by 3 of 5"), ((0.2,), "not judged: 20% foreign use")):
        result = made_up([99, 100, 101, 99, 100], monkeypatch, mark=100, foreign=foreign)
        last = command._figures(result).columns[-1]
        assert [the_figure(result)["judged"]] == [str(cell) for cell in last.cells] == [said]


def test_few_runs_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made_up([100.0] * 2, monkeypatch, runs=2)["verdict"] == "few"


def test_an_unknown_scenario_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="there is no scenario nonsense; there are: drain"):
        suite.chosen(["drain", "nonsense"])


# ------------------------------------------------------------------ the command


def test_the_command_prints_a_table_and_writes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "QUICK_SCALE", 0.005)
    file = tmp_path / "result.json"
    said = CliRunner().invoke(
        main, ["bench", "submit", "--quick", "--json", str(file), "--dir", str(tmp_path)]
    )
    assert said.exit_code == 0, said.output
    result = json.loads(file.read_text())
    rate = result["scenarios"]["submit"]["figures"]["rate"]
    assert f"{rate['median']:,.0f}" in said.output
    assert result["machine"]["cpu"] in said.output and result["versions"]["redis_server"] in said.output
    assert result["verdict"] in ("noisy", "quick") and "not a result" in said.output.lower()
    assert [path for path in tmp_path.iterdir() if path != file] == []


def test_the_command_refuses_what_it_cannot_do() -> None:
    said = CliRunner().invoke(main, ["bench", "nonsense"])
    assert said.exit_code == 2 and "there is no scenario nonsense" in said.output
    said = CliRunner().invoke(main, ["bench", "--plot", "x.doc"])
    assert said.exit_code == 2 and ".svg" in said.output


def test_the_command_lists_its_scenarios() -> None:
    said = CliRunner().invoke(main, ["bench", "--list"])
    assert said.exit_code == 0 and all(name in said.output for name in suite.SCENARIOS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_result_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from tqe.bench import plot

    file = tmp_path / "result.svg"
    plot.check(file)
    plot.draw(made_up([100, 101, 99, 100, 103], monkeypatch), file)
    # Text is drawn as paths, each after a comment with what it says.
    assert "<!-- made-up -->" in file.read_text()
