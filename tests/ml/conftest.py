"""Fixtures of the duration model: one published version, shared by all tests that only read it."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.ml import made
from tqe.ml import model, trainer
from tqe.ml.dataset import Trace

AT = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


@dataclass(frozen=True)
class Published:
    trace: Trace
    path: Path
    manifest: model.Manifest


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A model that the gate has chosen."""
    trace = made.trace(3000)
    path, manifest = trainer.publish(trace, tmp_path_factory.mktemp("models"), servers=4, trained_at=AT)
    assert manifest.chosen == "model", manifest.gate
    return Published(trace, path, manifest)
