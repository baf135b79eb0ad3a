"""The Dockerfile, compose.yaml and the systemd unit: against schemas and rules, their commands for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import dockerfile
from tests.support import scraping
from tests.support.cli import PROGRAM, environment
from tests.support.waiting import wait_until
from tqe import settings
from tqe.supervisor import lifecycle

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("engine", "api")


# ------------------------------------------------------------------ the image


def test_the_image_leaves_compiler_and_sources_behind_and_runs_as_nobody() -> None:
    build, final = dockerfile.read(DEPLOY / "Dockerfile")
    assert build.base == final.base and "-slim-" in final.base  # the same Python on both sides of the copy
    assert "gcc" in build.steps[0][1]
    assert not re.search(r"gcc|make|-dev\b", " ".join(text for _, text in final.steps))
    assert "libgomp1" in " ".join(text for verb, text in final.steps if verb == "RUN")
    copied = [text for verb, text in final.steps if verb == "COPY"]
    assert copied == ["--from=build /opt/tqe /opt/tqe", "examples examples"]
    uid, gid = final.last("USER").split(":")
    assert int(uid) >= 10_000 and int(gid) >= 10_000
    assert [verb for verb, _ in final.steps][-3:] == ["USER", "ENTRYPOINT", "CMD"]
    # In the form without a shell: the supervisor itself is PID 1 and gets the signals.
    assert final.words("ENTRYPOINT") == ["tqe"]
    assert final.words("CMD")[0] == "run"


def test_what_is_copied_is_there_and_nothing_else_gets_into_the_context() -> None:
    ignore = DEPLOY / "Dockerfile.dockerignore"
    for stage in dockerfile.read(DEPLOY / "Dockerfile"):
        for verb, text in stage.steps:
            for name in text.split()[:-1] if verb == "COPY" and "--from" not in text else ():
                assert (ROOT / name).exists() and dockerfile.kept(ignore, name), name
    for secret in (".env", ".git", ".venv", "tqe.toml", "deploy"):
        assert not dockerfile.kept(ignore, secret)


def test_variables_of_the_image_are_settings() -> None:
    final = dockerfile.read(DEPLOY / "Dockerfile")[-1]
    env = dict(one.split("=", 1) for one in final.last("ENV").split())
    loaded = settings.load(env={k: v for k, v in env.items() if k.startswith("TQE_")})
    assert (loaded.pin, loaded.metrics_host, loaded.log_format) == (False, "0.0.0.0", "json")


# ------------------------------------------------------------------ compose


def test_compose_follows_its_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_on_this_machine_only_and_mounts_what_exists() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), volume
                assert volume.endswith(":ro"), volume
            else:
                assert source in COMPOSE["volumes"], volume
        assert service["restart"] == "unless-stopped"
    for name in OURS:
        assert SERVICES[name]["cap_drop"] == ["ALL"] and SERVICES[name]["read_only"]


def test_compose_waits_longer_than_the_grace() -> None:
    command = SERVICES["engine"]["command"]
    grace_s = int(command[command.index("--grace") + 1])
    assert int(SERVICES["engine"]["stop_grace_period"].removesuffix("s")) >= grace_s + 20


def test_each_part_names_the_others_as_compose_calls_them() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in SERVICES and port in SERVICES[host]["command"]
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    mounts = dict(one.split(":")[:2] for one in SERVICES["grafana"]["volumes"])
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/tqe.yml").read_text())
    assert mounts["./grafana/dashboards"] == provider["providers"][0]["options"]["path"]


class Composed:
    """Services of compose.yaml as plain processes: its commands, variables and files, other addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {name: lifecycle.check_port("127.0.0.1", 0) for name in ("redis", *OURS)}
        self.begun: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, program: list[str], *more: str) -> subprocess.Popen[bytes]:
        service = SERVICES[name]
        command = [self._here(str(word)) for word in service.get("command", ())]
        env = {key: self._here(str(value)) for key, value in service.get("environment", {}).items()}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*program, *command, *more],
                cwd=ROOT,  # where the image has the examples
                env=environment({"TQE_PIN": "false", "TQE_METRICS_HOST": "127.0.0.1", **env}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.begun.append(process)
        return process

    def health(self, name: str) -> bool:
        """What compose would ask, answered."""
        kind, _, option, code = SERVICES[name]["healthcheck"]["test"]
        assert (kind, option) == ("CMD", "-c")
        done = subprocess.run(
            [sys.executable, "-c", self._here(code)], capture_output=True, env=environment({})
        )
        return done.returncode == 0

    def _here(self, text: str) -> str:
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        for name, port in {
            "redis:6379": "redis",
            "127.0.0.1:6379": "redis",
            "127.0.0.1:9100": "engine",
            "127.0.0.1:8080": "api",
        }.items():
            text = text.replace(name, f"127.0.0.1:{self.ports[port]}")
        return {"9100": str(self.ports["engine"]), "8080": str(self.ports["api"])}.get(text, text)

    def close(self) -> None:
        for process in reversed(self.begun):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    made = Composed(tmp_path)
    yield made
    made.close()


def test_the_services_of_compose_start_and_work_together(composed: Composed) -> None:
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server on PATH, whose command line compose.yaml has")
    redis_command = SERVICES["redis"]["command"]
    assert redis_command[0] == "redis-server"
    composed.start("redis", [], "--port", str(composed.ports["redis"]), "--dir", str(composed.folder))
    engine = composed.start("engine", PROGRAM)
    wait_until(lambda: composed.health("engine"), 30, "the engine's health check")
    composed.start("api", PROGRAM)
    wait_until(lambda: composed.health("api"), 30, "the API's health check")
    body = json.dumps({"type": "GREET", "payload": {"name": "Ann"}}).encode()
    url = f"http://127.0.0.1:{composed.ports['api']}/api/v1/jobs"
    job = json.loads(scraping.post(url, body))["id"]
    wait_until(lambda: json.loads(scraping.scrape(f"{url}/{job}?wait=5"))["result"] == "Hello, Ann!")
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(20) == 0  # drained, as `docker compose stop` would have it


# ------------------------------------------------------------------ systemd


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "tqe.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_stops_as_the_engine_drains() -> None:
    told = unit()
    assert told["KillMode"] == ["mixed"] and told["KillSignal"] == ["SIGTERM"]
    (command,) = told["ExecStart"]
    words = command.split()
    assert int(told["TimeoutStopSec"][0]) >= int(words[words.index("--grace") + 1]) + 20
    assert told["User"] != ["root"] and told["NoNewPrivileges"] == ["true"]


def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "systemd" / "tqe.service").read_text().replace("/opt/tqe/bin/tqe", "/bin/true")
    (tmp_path / "tqe.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "tqe.service")], capture_output=True, text=True
    )
    assert "tqe.service" not in done.stderr, done.stderr


def test_the_commands_of_image_and_unit_are_ours() -> None:
    """Options that do not exist any more would be found by whoever deploys."""

    def help_of(verb: str) -> str:
        command = [*PROGRAM, verb, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    final = dockerfile.read(DEPLOY / "Dockerfile")[-1]
    commands = [
        final.words("CMD"),
        unit()["ExecStart"][0].split()[1:],
        *(SERVICES[one]["command"] for one in OURS),
    ]
    for verb, *words in commands:
        known = help_of(verb)
        for word in words:
            assert not word.startswith("--") or f"{word} " in known or f"{word}/" in known, (verb, word)
