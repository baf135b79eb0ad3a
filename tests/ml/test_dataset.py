"""Traces: what is read, what is refused, what is left out."""

import gzip
import json
import math
from pathlib import Path

import pytest

from tests.ml import made
from tqe.ml import ModelError, dataset
from tqe.ml.dataset import Facts, Record


def test_a_file_gives_the_jobs_that_were_written(tmp_path: Path) -> None:
    path, schema = made.write(tmp_path, 50)
    read, memory = dataset.read(path, schema), made.trace(50)
    assert read.name == "made" and len(read) == 50
    assert read.numeric == ("size",) and read.categorical == ("user",)
    assert [facts.type for facts in read.facts] == [facts.type for facts in memory.facts]
    assert [facts.fields for facts in read.facts] == [facts.fields for facts in memory.facts]
    assert read.duration_s == pytest.approx(memory.duration_s, abs=1e-6)
    # Monday 4 March 2024, 00:00 UTC
    assert read.facts[0].at_s == pytest.approx(1709510400 + made.records(1)[0].submit_s, abs=1e-5)


def test_unsorted_lines_are_sorted_and_bad_ones_left_out() -> None:
    lines = [(5.0, 1.0), (3.0, 2.0), (4.0, math.nan), (math.inf, 1.0), (3.0, -1.0), (3.0, 0.0)]
    read = dataset.collect("t", [Record(Facts("A"), at, s) for at, s in lines])
    assert list(read.submit_s) == [0.0, 0.0, 2.0]
    assert list(read.duration_s) == [2.0, dataset.DURATION_MIN_S, 1.0]


def test_a_blank_or_broken_number_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "submit_s,type,n,c,duration_s\n0,A,,x,1\n1,A,abc,,2\n2,A,inf,y,3\n3,A,7,z,oops\n"
    )
    (tmp_path / "s.json").write_text(
        json.dumps({"key": "type", "numeric": ["n"], "categorical": ["c"], "columns": []})
    )
    read = dataset.read(tmp_path / "t.csv", tmp_path / "s.json")
    assert [facts.fields["n"] for facts in read.facts] == [None, None, None]
    assert [facts.fields["c"] for facts in read.facts] == ["x", None, "y"]


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ("[]", "no entry"),
        ("{", "cannot be read"),
        ('{"a": {"file": "x"}, "b": {"file": "y"}}', "no entry"),
        ('{"columns": [], "numeric": "n"}', "must be lists"),
        ('{"columns": [], "numeric": ["gone"], "key": "type"}', "no column gone"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(tmp_path: Path, schema: str, part: str) -> None:
    (tmp_path / "t.csv").write_text("submit_s,type,duration_s\n0,A,1\n")
    (tmp_path / "s.json").write_text(schema)
    with pytest.raises(ModelError, match=part):
        dataset.read(tmp_path / "t.csv", tmp_path / "s.json")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path, schema = made.write(tmp_path, 200)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        dataset.read(path, schema)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path, schema = made.write(tmp_path, 10)
    path.write_bytes(gzip.compress(b"submit_s,type,user,size,duration_s\n"))
    with pytest.raises(ModelError, match="no usable job"):
        dataset.read(path, schema)
