"""`tqe bench` on small numbers: what it measures, what it says of the machine, what it calls a result."""

import json
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
    values: Sequence[float], monkeypatch: pytest.MonkeyPatch, *, runs: int = suite.RUNS, **figure: Any
) -> dict[str, Any]:
    """A session of one scenario whose figure is given, on a machine that is silent."""
    left = list(values)
    one = Figure(**{"name": "rate", "unit": "jobs/s", "label": "made up", "more": True, **figure})
    scenario = Scenario(name="made-up", what="-", figures=(one,), play=lambda lab: {"rate": left.pop(0)})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return suite.run([scenario], runs=runs)


def test_a_quiet_session_is_a_result_and_is_held_against_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up([100, 101, 99, 100, 103], monkeypatch, mark=100)
    figure = result["scenarios"]["made-up"]["figures"]["rate"]
    assert result["verdict"] == "result" and result["noise"] == []
    assert (figure["median"], figure["min"], figure["max"], figure["met"]) == (100, 99, 103, True)
    assert figure["spread"] == 0.04


def test_a_mark_is_missed_in_the_right_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    more = made_up([99.0] * 5, monkeypatch, mark=100)
    less = made_up([99.0] * 5, monkeypatch, mark=100, more=False)
    assert [r["scenarios"]["made-up"]["figures"]["rate"]["met"] for r in (more, less)] == [False, True]


def test_a_wide_spread_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up([100, 80, 100, 100, 100], monkeypatch)
    assert result["verdict"] == "noisy" and "made up spreads over 20%" in result["noise"][0]
    assert made_up([100, 80, 100, 100, 100], monkeypatch, steady=False)["verdict"] == "result"


def test_a_loaded_machine_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up([100.0] * 5, monkeypatch)
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 0.0, 0.0))
    scenario = Scenario(name="made-up", what="-", figures=(), play=lambda lab: {})
    result = suite.run([scenario])
    assert result["verdict"] == "noisy" and "load average was 50.0" in result["noise"][0]


def test_other_programs_make_a_run_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    def disturbed(lab: Lab) -> Figures:
        lab.foreign.append(0.2)
        return {}

    result = suite.run([Scenario(name="made-up", what="-", figures=(), play=disturbed)])
    assert (
        result["verdict"] == "noisy"
        and "up to 20% of the machine during runs of made-up" in result["noise"][0]
    )


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
