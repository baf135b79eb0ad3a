"""The folder of vetted versions and the trainings, as `tqe run` gives them to its steward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ml.made import trace
from tests.support.fake_clock import FakeClock
from tqe.cli import vault
from tqe.cli.vault import Vault
from tqe.ml import canary, model, trainer
from tqe.settings import Settings
from tqe.store.learning import Files


@pytest.fixture
def made(tmp_path: Path, fake_clock: FakeClock) -> Iterator[Vault]:
    one = Vault(Settings(data_dir=tmp_path), "", library=True, training_s=60.0, time=fake_clock)
    yield one
    one.close()


def test_where_the_canary_cannot_run_it_is_the_hosts_fault(
    made: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = trainer.publish(trace(2500), tmp_path / "m", servers=4, trained_at=model.now())
    names = {"manifest": model.MANIFEST, "history": model.HISTORY, "model": model.MODEL}
    files = Files(**{what: (folder / name).read_bytes() for what, name in names.items()})

    def run(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(canary.subprocess, "run", run)
        reason, fault = made.install(manifest.version, files).result(30)
    assert fault == "host" and "could not be started" in reason
    monkeypatch.setattr(made, "_gate", canary.Gatekeeper(limit_s=20))
    assert made.install(manifest.version, files).result(30) == ("", "")


def test_a_training_that_hangs_ends(
    made: Vault, fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def sleeps(argv: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", "import time; time.sleep(600)"], **options)

    monkeypatch.setattr(vault.subprocess, "Popen", sleeps)
    made.train(servers=1)
    assert made.trained() is None and made.training
    fake_clock.advance(ms=61_000)
    assert "had not ended after 60 s" in (made.trained() or "") and not made.training
