"""`tqe ml`: what scripts read, what people see, how it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.ml import made
from tqe.cli.main import main
from tqe.ml import model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path, schema = made.write(tmp_path_factory.mktemp("trace"), 1500)
    return str(path), str(schema)


def run(*args: str) -> Result:
    result = CliRunner().invoke(main, ["ml", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_evaluate_prints_json_and_draws(files: tuple[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    result = run(
        "evaluate",
        files[0],
        "--schema",
        files[1],
        "--servers",
        "4",
        "--loads",
        "0.7,0.9",
        "--json",
        "--plot",
        str(picture),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["servers"] == 4 and list(report["loads"]) == ["0.7", "0.9"]
    assert picture.read_text().startswith("<?xml")


def test_evaluate_prints_a_table(files: tuple[str, str]) -> None:
    result = run("evaluate", files[0], "--schema", files[1], "--loads", "0.9")
    assert result.exit_code == 0
    assert "bounded_chosen" in result.stdout and "load 0.9" in result.stdout and "chosen: " in result.stdout


def test_train_publishes_and_says_why(files: tuple[str, str], tmp_path: Path) -> None:
    result = run("train", files[0], "--schema", files[1], "--out", str(tmp_path), "--servers", "4", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    (path,) = model.versions(tmp_path)
    assert said["folder"] == str(path) and said["version"] == path.name
    assert model.read(path).manifest.chosen == said["chosen"]
    people = run("train", files[0], "--schema", files[1], "--out", str(tmp_path), "--servers", "4")
    assert "chosen: " in people.stdout and "T = " in people.stdout


def test_train_takes_a_bound_in_seconds(files: tuple[str, str], tmp_path: Path) -> None:
    told = ("train", files[0], "--schema", files[1], "--out", str(tmp_path), "--bound")
    said = json.loads(run(*told, "30.5", "--json").stdout)
    assert said["bound_s"] == 30.5 and said["gate"]["bound"] == "T was given in seconds"
    assert model.read(Path(said["folder"])).manifest.bound_s == 30.5
    assert run(*told, "-1").exit_code == 2


def test_simulate_answers(files: tuple[str, str]) -> None:
    result = run(
        "simulate", files[0], "--schema", files[1], "--servers", "2,4", "--modes", "fifo,sjf", "--json"
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [answer["servers"] for answer in said["servers"]] == [2, 4]
    assert list(said["servers"][0]["modes"]) == ["fifo", "sjf"]
    assert "mean wait" in run("simulate", files[0], "--schema", files[1], "--servers", "4").stdout


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("--loads", "0.9,x"), "no list of numbers"),
        (("--loads", "99"), "is not between"),
        (("--servers", "0"), "--servers"),
    ],
)
def test_wrong_usage_is_told(files: tuple[str, str], args: tuple[str, ...], part: str) -> None:
    result = run("evaluate", files[0], "--schema", files[1], *args)
    assert result.exit_code == 2 and part in result.output


def test_a_wrong_mode_or_file_is_told(files: tuple[str, str], tmp_path: Path) -> None:
    result = run("simulate", files[0], "--schema", files[1], "--modes", "lifo")
    assert result.exit_code == 2 and "none of fifo" in result.output
    broken = tmp_path / "made.csv.gz"
    broken.write_bytes(b"no gzip")
    result = run("evaluate", str(broken), "--schema", files[1])
    assert result.exit_code == 1 and "cannot be read" in result.output
