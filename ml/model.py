"""Owns published models: a folder a version, written aside and renamed, checked byte by byte before use.

A folder holds `model.txt` (LightGBM's text; absent when the hierarchical mean won), `history.json.gz` and
`manifest.json` with everything that must fit: schema, columns in order, hashes, window, the gate's figures,
m, T, and reference rows with the predictions that they must give.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tqe import clock
from tqe.ml import HostError, ModelError
from tqe.ml.features import FEATURES, Columns, Schema
from tqe.ml.history import History
from tqe.ml.score import Booster

FORMAT: Final = 1  # of the folder
MODEL: Final = "model.txt"
HISTORY: Final = "history.json.gz"
MANIFEST: Final = "manifest.json"
REFERENCE_ROWS: Final = 16
TOLERANCE: Final = 1e-6  # relative; what another build of the library may differ by
MODEL_BYTES_MAX: Final = 32 * 1024 * 1024
HISTORY_BYTES_MAX: Final = 256 * 1024 * 1024
_VERSION: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{12}")

# What JSON cannot say as a number.
_NAN: Final = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is promised of a folder's files."""

    version: str
    trained_at: str  # ISO, UTC
    chosen: str  # model | hierarchical_mean | type_mean | fifo
    schema: Schema
    columns: tuple[str, ...]
    sha256: str  # of model.txt; empty when there is none
    history_sha256: str
    window: Mapping[str, Any]  # name, jobs, span_s of the jobs that were learnt from
    gate: Mapping[str, Any]
    mean_s: float
    scale_s: float  # m
    bound_s: float  # T at publication
    bound_factor: float  # T in mean FIFO waits, for keeping it up to date
    floor: float  # what the watch may not see undercut
    reference_rows: Sequence[Sequence[float]]
    reference_ratios: Sequence[float]

    def dump(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "features": FEATURES,
            "version": self.version,
            "trained_at": self.trained_at,
            "chosen": self.chosen,
            "schema": self.schema.dump(),
            "columns": list(self.columns),
            "sha256": self.sha256,
            "history_sha256": self.history_sha256,
            "window": dict(self.window),
            "gate": dict(self.gate),
            "mean_s": self.mean_s,
            "scale_s": self.scale_s,
            "bound_s": self.bound_s,
            "bound_factor": self.bound_factor,
            "floor": self.floor,
            "reference_rows": [[_NAN if v != v else v for v in row] for row in self.reference_rows],
            "reference_ratios": list(self.reference_ratios),
        }

    @classmethod
    def load(cls, found: Mapping[str, Any]) -> Manifest:
        """Raises ModelError for another format or definition of the columns; KeyError, TypeError, ValueError
        for what is no manifest."""
        if found["format"] != FORMAT or found["features"] != FEATURES:
            raise ModelError(
                f"the model is of format {found['format']}.{found['features']},"
                f" this version reads {FORMAT}.{FEATURES}: train again"
            )
        schema = Schema.load(found["schema"])
        columns = tuple(found["columns"])
        if columns != schema.columns:
            raise ModelError("the model's columns are not those that the code would make: train again")
        numbers = {
            name: float(found[name]) for name in ("mean_s", "scale_s", "bound_s", "bound_factor", "floor")
        }
        if not all(math.isfinite(v) and v >= 0 for name, v in numbers.items() if name != "floor"):
            raise ValueError("m or T is no usable number")
        rows = [[math.nan if v is None else float(v) for v in row] for row in found["reference_rows"]]
        ratios = [float(v) for v in found["reference_ratios"]]
        if len(rows) != len(ratios) or any(len(row) != len(columns) for row in rows):
            raise ValueError("the reference rows do not fit the columns")
        return cls(
            version=str(found["version"]),
            trained_at=str(found["trained_at"]),
            chosen=str(found["chosen"]),
            schema=schema,
            columns=columns,
            sha256=str(found["sha256"]),
            history_sha256=str(found["history_sha256"]),
            window=dict(found["window"]),
            gate=dict(found["gate"]),
            **numbers,
            reference_rows=rows,
            reference_ratios=ratios,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A folder that was read and whose hashes fit. Nothing of it has been near the library yet."""

    manifest: Manifest
    model: bytes | None
    history: History


def version_of(trained_at: datetime, model: bytes) -> str:
    """Sortable by time, and different for different models of one second."""
    return f"{trained_at:%Y%m%dT%H%M%S}-{hashlib.sha256(model).hexdigest()[:12]}"


def now() -> datetime:
    """UTC, whole seconds."""
    return datetime.fromtimestamp(clock.wall_ms() // 1000, UTC)


def encode_history(history: History) -> bytes:
    """The same history gives the same bytes."""
    text = json.dumps(history.dump(), separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def reference(rows: Sequence[Sequence[float]], booster: Booster, columns: Columns) -> tuple[Any, Any]:
    """Rows spread over those given, and the ratios that the model gives for them."""
    step = max(1, len(rows) // REFERENCE_ROWS)
    picked = [list(row) for row in rows[::step][:REFERENCE_ROWS]]
    return picked, list(booster.predict(columns.flat(picked), len(picked)))


def publish(folder: Path, manifest: Manifest, model: bytes | None, history: bytes) -> Path:
    """Write a version below `folder`. It appears whole or not at all: a crash leaves a name that starts with
    a dot, which nobody reads. Raises ModelError."""
    target = folder / manifest.version
    aside = folder / f".{manifest.version}.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        files = {HISTORY: history, MANIFEST: json.dumps(manifest.dump(), indent=1, allow_nan=False).encode()}
        if model is not None:
            files[MODEL] = model
        for name, data in files.items():
            _write(aside / name, data)
        _sync(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _sync(folder)
    except OSError as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise ModelError(f"the model cannot be written to {target}: {e}") from e
    return target


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions(folder: Path) -> list[Path]:
    """Published versions below a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _VERSION.fullmatch(path.name))


def read(folder: Path) -> Files:
    """Read one version and check it against its manifest. Raises ModelError; the library sees nothing."""
    manifest, model = read_model(folder)
    with _told(folder):
        history = _hashed(folder / HISTORY, manifest.history_sha256, HISTORY_BYTES_MAX)
        loaded = History.load(json.loads(gzip.decompress(history)))
    if len(loaded.levels) != manifest.schema.levels:
        raise ModelError(f"the history in {folder} does not fit its schema")
    return Files(manifest=manifest, model=model, history=loaded)


def read_model(folder: Path) -> tuple[Manifest, bytes | None]:
    """The same without the history, which may be large."""
    with _told(folder):
        manifest = Manifest.load(json.loads((folder / MANIFEST).read_bytes()))
        model = _hashed(folder / MODEL, manifest.sha256, MODEL_BYTES_MAX) if manifest.sha256 else None
    return manifest, model


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a folder's files is a ModelError that names it; a HostError where they may be
    fine."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise ModelError(f"the model in {folder} cannot be read: {e}") from e
    except (OSError, MemoryError) as e:
        raise HostError(f"this host cannot read the model in {folder}: {e!r}") from e
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as e:
        raise ModelError(f"the model in {folder} is damaged or is none: {e!r}") from e


def _hashed(path: Path, sha256: str, bytes_max: int) -> bytes:
    if path.stat().st_size > bytes_max:
        raise ModelError(f"{path} has more than {bytes_max:,} bytes")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(f"{path} is damaged: its SHA-256 is not the manifest's")
    return data


def load(files: Files) -> Booster | None:
    """Open the model in this process. Only after a canary has survived it. Raises ModelError."""
    return None if files.model is None else open_model(files.manifest, files.model)


def open_model(manifest: Manifest, text: bytes) -> Booster:
    """Open a model's text, and check that the reference rows give what they should. Raises ModelError."""
    booster = Booster(text, len(manifest.columns))
    try:
        check(manifest, booster)
    except ModelError:
        booster.close()
        raise
    return booster


def check(manifest: Manifest, booster: Booster) -> None:
    """The reference rows give the predictions of the day of training. Raises ModelError."""
    if not manifest.reference_rows:
        raise ModelError("the manifest has no reference rows")
    flat = array("d")
    for row in manifest.reference_rows:
        flat.extend(row)
    found = booster.predict(flat, len(manifest.reference_rows))
    for ours, theirs in zip(found, manifest.reference_ratios, strict=True):
        if not math.isclose(ours, theirs, rel_tol=TOLERANCE):
            raise ModelError(f"a reference row gives {ours:g} where training gave {theirs:g}")
