"""Published folders: what is written can be read; what is damaged is refused before the library sees it."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ml.conftest import AT, Published
from tqe.ml import HostError, ModelError, canary, model, trainer
from tqe.ml.score import Booster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(published: Published, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published.path, tmp_path / published.path.name))


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / model.MANIFEST).read_text())
    (folder / model.MANIFEST).write_text(json.dumps(manifest | changes))


def rehash(folder: Path) -> None:
    """Make the manifest swear to whatever the model file is now."""
    edit(folder, sha256=hashlib.sha256((folder / model.MODEL).read_bytes()).hexdigest())


def test_a_version_is_read_as_it_was_written(published: Published) -> None:
    files = model.read(published.path)
    assert files.manifest.dump() == published.manifest.dump()
    assert files.manifest.version == published.path.name == model.version_of(AT, files.model or b"")
    assert sorted(p.name for p in published.path.iterdir()) == [model.HISTORY, model.MANIFEST, model.MODEL]
    assert len(files.manifest.reference_rows) == model.REFERENCE_ROWS
    assert canary.Gatekeeper(limit_s=30).admit(published.path).model == files.model


def test_the_same_trace_gives_the_same_bytes(published: Published, tmp_path: Path) -> None:
    again, _ = trainer.publish(published.trace, tmp_path, servers=4, trained_at=AT)
    for name in (model.MODEL, model.HISTORY, model.MANIFEST):
        assert (again / name).read_bytes() == (published.path / name).read_bytes()
    assert model.versions(tmp_path) == [again]


def test_another_process_makes_the_same_bytes(published: Published, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.ml import made
from tests.ml.conftest import AT
from tqe.ml import trainer
trainer.publish(made.trace({len(published.trace)}), Path({str(tmp_path)!r}), servers=4, trained_at=AT)
"""
    env = os.environ | {"PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50, env=env, cwd=ROOT)
    (again,) = model.versions(tmp_path)
    for name in (model.MODEL, model.HISTORY, model.MANIFEST):
        assert (again / name).read_bytes() == (published.path / name).read_bytes()


def test_another_trace_gives_another_model(published: Published, tmp_path: Path) -> None:
    other, _ = trainer.publish(published.trace.part(0, 2900), tmp_path, servers=4, trained_at=AT)
    assert (other / model.HISTORY).read_bytes() != (published.path / model.HISTORY).read_bytes()


def test_a_model_that_does_not_survive_its_canary_is_not_published(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "passes", lambda path, limit_s: "killed by signal 6")
    with pytest.raises(ModelError, match="signal 6"):
        trainer.publish(published.trace, tmp_path, servers=4, trained_at=AT)
    assert model.versions(tmp_path) == []


def test_a_crash_while_writing_leaves_nothing_that_is_read(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Path, target: Path) -> Path:
        raise OSError("the machine is gone")

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(ModelError, match="cannot be written"):
        model.publish(tmp_path, published.manifest, b"x", b"y")
    assert model.versions(tmp_path) == []


def test_versions_are_in_the_order_of_training(tmp_path: Path) -> None:
    names = ["20240506T070809-aaaaaaaaaaaa", "20240506T070810-000000000000", "20250101T000000-0123456789ab"]
    for name in [*reversed(names), ".20260101T000000-0123456789ab.7", "notes"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in model.versions(tmp_path)] == names
    assert model.versions(tmp_path / "none") == []


# --- damage ---


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library must not see a byte."""

    def seen(self: Booster, text: bytes, columns: int) -> None:
        raise AssertionError("the library saw a file that had not been checked")

    monkeypatch.setattr(Booster, "__init__", seen)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", [model.MODEL, model.HISTORY, model.MANIFEST])
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "flipped", "foreign"])
def test_a_damaged_file_is_refused_before_the_library_sees_it(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": data[:middle],
                "flipped": data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :],
                "foreign": b"#!/bin/sh\nexit 1\n",
            }[damage]
        )
    if name == model.MANIFEST and damage == "flipped":
        edited = data.replace(b'"scale_s":', b'"scale_x":')
        path.write_bytes(edited)
    with pytest.raises(ModelError):
        canary.Gatekeeper().admit(folder)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 99}, "train again"),
        ({"features": 0}, "train again"),
        ({"columns": ["a", "b"]}, "columns are not those"),
        ({"scale_s": -1}, "damaged"),
        ({"bound_s": float("nan")}, "damaged"),
        ({"reference_rows": [[1.0]]}, "damaged"),
        ({"schema": {}}, "damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], part: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=part):
        canary.Gatekeeper().admit(folder)


@pytest.mark.usefixtures("unseen")
def test_columns_in_another_order_are_refused(folder: Path, published: Published) -> None:
    edit(folder, columns=list(reversed(published.manifest.columns)))
    with pytest.raises(ModelError, match="columns are not those"):
        model.read(folder)


def test_a_damaged_history_of_the_right_hash_is_refused(folder: Path) -> None:
    import gzip

    data = gzip.compress(b'{"jobs": 1, "mean_s": 1.0, "greatest_s": 1.0, "levels": [[["A", [1, 2]]]]}')
    (folder / model.HISTORY).write_bytes(data)
    edit(folder, history_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ModelError, match="damaged"):
        model.read(folder)


def test_damage_of_the_right_hash_meets_the_canary_and_is_never_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such files kill the process that loads them, or load and predict something else; here that is a
    child."""
    good = (folder / model.MODEL).read_bytes()
    draw = random.Random(4)
    gatekeeper = canary.Gatekeeper(limit_s=20)
    at = draw.randrange(len(good) // 10, len(good) // 2)
    for bad in (good[: len(good) // 2], good[:at] + b"9" * 40 + good[at + 40 :], b""):
        (folder / model.MODEL).write_bytes(bad)
        rehash(folder)
        with pytest.raises(ModelError, match="canary"):
            gatekeeper.admit(folder)
    monkeypatch.setattr(canary, "passes", lambda *a, **k: pytest.fail("tried again"))
    with pytest.raises(ModelError, match="refused before"):
        gatekeeper.admit(folder)
    assert len(gatekeeper.banned) == 3


def test_another_models_predictions_are_found_by_the_reference_rows(folder: Path) -> None:
    manifest = json.loads((folder / model.MANIFEST).read_text())
    ratios = manifest["reference_ratios"]
    edit(folder, reference_ratios=[ratios[0] * 1.01, *ratios[1:]])
    assert "reference row" in canary.passes(folder, limit_s=20)


# --- the canary's own ends ---


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import time; time.sleep(30)", "had not finished"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import os; os.abort()", "signal 6"),
        ("import sys; sys.exit('it is red')", "it is red"),
        ("import os; os._exit(9)", "exit code 9"),
        ("pass", ""),
    ],
)
def test_whatever_ends_the_canary_is_told(tmp_path: Path, code: str, part: str) -> None:
    reason = canary.passes(
        tmp_path, limit_s=0.5 if "sleep" in code else 20, command=(sys.executable, "-c", code)
    )
    assert part in reason and bool(reason) == bool(part)


def test_what_the_host_lacks_is_not_the_models_fault(folder: Path) -> None:
    """No process, or killed for the memory of others: another try may succeed, so nothing is banned."""
    for command in (
        (str(folder / "none"),),
        (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        (sys.executable, "-c", f"import sys; sys.exit({canary.HOST_EXIT})"),
    ):
        gatekeeper = canary.Gatekeeper(limit_s=20, command=command)
        with pytest.raises(HostError):
            gatekeeper.admit(folder)
        assert gatekeeper.banned == {}


def test_the_canary_does_not_read_the_history(folder: Path) -> None:
    (folder / model.HISTORY).write_bytes(b"as long as it likes")
    assert canary.passes(folder, limit_s=20) == ""
