"""What `tqe run` hands to its steward: the folder of vetted versions, the watch, and trainings in the
background."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

from tqe import clock
from tqe import settings as settings_module
from tqe.cli.predictor import folder_of
from tqe.ml import HostError, ModelError, canary, model
from tqe.ml.watch import Watch
from tqe.settings import Settings
from tqe.steward.model import Fault
from tqe.store.learning import Files

VERSIONS_KEPT: Final = 8
# A training of 100,000 jobs takes half a minute of CPU. It gives way to all others, so it may wait long; one
# that hangs would keep the next from ever beginning.
TRAINING_S: Final = 3600.0


class Vault:
    """One host's versions. Nothing gets into the folder that a canary has not survived."""

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        *,
        library: bool,
        training_s: float = TRAINING_S,
        time: clock.Clock = clock.SYSTEM,
    ) -> None:
        self._settings = settings
        self._training_s, self._time = training_s, time
        self._training_since_ns = 0
        self._redis_url = redis_url
        self._library = library
        self._folder = folder_of(settings)
        self._gate = canary.Gatekeeper()
        self._pool: ThreadPoolExecutor | None = None
        self._training: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    # -- versions

    def has(self, version: str) -> bool:
        """Whether workers of this host may load it."""
        return bool(version) and (self._folder / version / model.MANIFEST).is_file()

    def install(self, version: str, files: Files) -> Future[tuple[str, Fault]]:
        """Write a version aside, check it, let a canary load it, and only then give it its name.

        The answer is (reason why not, '' if all is well; whose fault that is). On a thread: the canary may
        take two seconds, and leases must be renewed.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tqe-model")
        return self._pool.submit(self._install, version, files)

    def _install(self, version: str, files: Files) -> tuple[str, Fault]:
        aside = self._folder / f".{version}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / model.MANIFEST).write_bytes(files.manifest)
            (aside / model.HISTORY).write_bytes(files.history)
            if files.model is not None:
                (aside / model.MODEL).write_bytes(files.model)
            return self._vet(aside, version)
        except HostError as e:
            return str(e), "host"
        except (OSError, MemoryError) as e:
            return f"{self._folder} cannot be written: {e!r}", "host"
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _vet(self, aside: Path, version: str) -> tuple[str, Fault]:
        try:
            model.Manifest.load(json.loads((aside / model.MANIFEST).read_bytes()))
        except ModelError as e:
            return str(e), "host"  # another release's, which that one can use
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            return f"the manifest is damaged or is none: {e!r}", "version"
        fault: Fault = "version"
        try:
            model.read(aside)
            fault = "model"
            if self._library:  # without it the mean is used, and the model's bytes are never loaded
                self._gate.admit(aside)
        except HostError:
            raise
        except ModelError as e:
            return str(e), fault
        target = self._folder / version
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        for old in model.versions(self._folder)[:-VERSIONS_KEPT]:
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
        return "", ""

    # -- the watch

    def watch(self, version: str, rung: str) -> Watch | None:
        """The watch over a version that orders; None where its files cannot be read."""
        try:
            manifest = model.read(self._folder / version).manifest
        except ModelError:
            return None
        usable: Any = rung if rung in ("model", "mean", "fifo") else "mean"
        return Watch(floor=manifest.floor, has_model=bool(manifest.sha256), rung=usable)

    # -- trainings

    def train(self, *, servers: int) -> None:
        """Begin a training on what was captured, in a process that gives way to all others."""
        self._training_since_ns = self._time.boottime_ns()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - read when the training has ended
        self._training = subprocess.Popen(
            [
                sys.executable, "-m", "tqe.cli.main",
                "ml", "train", "--background", "--servers", str(servers), "--json",
            ],
            env=settings_module.environment(
                redis_url=self._redis_url,
                namespace=self._settings.namespace,
                data_dir=str(self._settings.data_dir),
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )  # fmt: skip

    def trained(self) -> str | None:
        """None while none has ended, else what it failed with, '' if it published a version."""
        if self._training is None:
            return None
        if self._training.poll() is None:
            if self._time.boottime_ns() - self._training_since_ns < self._training_s * 1e9:
                return None
            self._training.kill()
            self._training.wait()
        code, self._training = self._training.returncode, None
        text = ""
        if self._said is not None:
            self._said.seek(0)
            text = self._said.read().decode("utf-8", "replace").strip()
            self._said.close()
            self._said = None
        if code == -signal.SIGKILL:
            return f"it was killed, by the system or because it had not ended after {self._training_s:.0f} s"
        return "" if code == 0 else (text.splitlines() or [f"exit code {code}"])[-1][:500]

    @property
    def training(self) -> bool:
        return self._training is not None

    def close(self) -> None:
        """End what was begun."""
        if self._training is not None:
            self._training.kill()
            self._training.wait()
        if self._said is not None:
            self._said.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
