"""The Dockerfile, compose.yaml and the systemd unit: against schemas and rules, their commands for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import dockerfile
from tests.deploy.test_kubernetes import pods
from tests.support import scraping
from tests.support.cli import PROGRAM, Cli, environment
from tests.support.ports import reserved_port
from tests.support.waiting import wait_until
from tqe import settings
from tqe.api import processes

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("engine", "token", "api")


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
        assert service["restart"] == ("on-failure" if name == "token" else "unless-stopped")
    for name in OURS:
        assert SERVICES[name]["cap_drop"] == ["ALL"] and SERVICES[name]["read_only"]


def test_compose_waits_longer_than_the_grace() -> None:
    command = SERVICES["engine"]["command"]
    grace_s = int(command[command.index("--grace") + 1])
    assert int(SERVICES["engine"]["stop_grace_period"].removesuffix("s")) >= grace_s + 20


def test_compose_gives_open_requests_their_time() -> None:
    assert int(SERVICES["api"]["stop_grace_period"].removesuffix("s")) >= processes.DRAIN_S + 2 + 5


def test_each_part_names_the_others_as_compose_calls_them() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    for job in scraped:
        (target,) = job["static_configs"][0]["targets"]
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
        self.ports = {name: reserved_port() for name in ("redis", "engine", "api", "prometheus")}
        self.begun: list[subprocess.Popen[bytes]] = []
        (folder / "tokens").mkdir()
        shutil.copytree(DEPLOY / "prometheus", folder / "prometheus")
        config = folder / "prometheus" / "prometheus.yml"
        # Sooner than a test would wait; all else is as committed.
        text = (
            config.read_text().replace("interval: 10s", "interval: 1s").replace("timeout: 5s", "timeout: 1s")
        )
        config.write_text(self.here(text))

    def start(self, name: str, program: list[str], *more: str) -> subprocess.Popen[bytes]:
        service = SERVICES[name]
        command = [self.here(str(word)) for word in service.get("command", ())]
        env = {key: self.here(str(value)) for key, value in service.get("environment", {}).items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*program, *service.get("entrypoint", ()), *command, *more],
                cwd=ROOT,  # where the image has the examples
                env=environment({"TQE_PIN": "false", "TQE_METRICS_HOST": "127.0.0.1", "PATH": path, **env}),
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
            [sys.executable, "-c", self.here(code)], capture_output=True, env=environment({})
        )
        return done.returncode == 0

    def url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}{path}"

    def here(self, text: str) -> str:
        """The same with addresses and folders of this test."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        for host, port in (("redis", "6379"), ("engine", "9100"), ("api", "8080")):
            text = re.sub(rf"\b({host}|127\.0\.0\.1):{port}\b", f"127.0.0.1:{self.ports[host]}", text)
        for mount, folder in (
            ("/tokens", "tokens"),
            ("/etc/prometheus", "prometheus"),
            ("=/prometheus", "data"),
        ):
            prefix = "=" if mount.startswith("=") else ""
            text = re.sub(rf"(?<!\w){mount}\b", f"{prefix}{self.folder / folder}", text)
        return {"9100": str(self.ports["engine"]), "8080": str(self.ports["api"])}.get(text, text)

    def asked(self, query: str) -> list[dict[str, Any]]:
        """What Prometheus answers; nothing while it does not."""
        path = f"/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            found: list[dict[str, Any]] = json.loads(scraping.scrape(self.url("prometheus", path)))["data"][
                "result"
            ]
        except OSError:
            return []
        return found

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
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH, whose command line compose.yaml has")
    assert SERVICES["redis"]["command"][0] == "redis-server"
    composed.start("redis", [], "--port", str(composed.ports["redis"]), "--dir", str(composed.folder))
    engine = composed.start("engine", PROGRAM)
    wait_until(lambda: composed.health("engine"), 30, "the engine's health check")
    cli = Cli({"TQE_REDIS_URL": composed.here("redis://redis:6379/0")})
    token = cli("token", "create", "me").stdout.strip()
    cli("token", "create", "prometheus")  # of an `up` before this one
    assert composed.start("token", []).wait(30) == 0
    api = composed.start("api", PROGRAM)
    wait_until(lambda: composed.health("api"), 30, "the API's health check")

    url = composed.url("api", "/api/v1/jobs")
    body = json.dumps({"type": "GREET", "payload": {"name": "Ann"}}).encode()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        scraping.post(url, body)
    job = json.loads(scraping.post(url, body, token=token))["id"]
    wait_until(
        lambda: json.loads(scraping.scrape(f"{url}/{job}?wait=5", token=token))["result"] == "Hello, Ann!",
        30,
        "the job's result",
    )
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian and Ubuntu: apt-get install prometheus)")
    told = composed.start(
        "prometheus", ["prometheus"], f"--web.listen-address=127.0.0.1:{composed.ports['prometheus']}"
    )
    ran = 'taskqueue_job_execution_duration_seconds_count{job="tqe", type="GREET"} == 1'
    wait_until(lambda: composed.asked(ran), 30, "the engine's page in Prometheus")
    for name in ("tqe", "tqe-api"):
        total = f'taskqueue_jobs_completed_total{{job="{name}"}} == 1'
        wait_until(lambda total=total: composed.asked(total), 30, f"the queue's total from {name}")  # type: ignore[misc]
    groups = json.loads(scraping.scrape(composed.url("prometheus", "/api/v1/rules")))["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}

    for process in (api, engine, told):
        process.send_signal(signal.SIGTERM)  # as `docker compose stop` would
        assert process.wait(30) == 0


# ------------------------------------------------------------------ systemd


UNITS = ("tqe.service", "tqe-api.service")


def unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_units_stop_as_what_they_run_drains(name: str) -> None:
    told = unit(name)
    assert told["KillMode"] == ["mixed"] and told["KillSignal"] == ["SIGTERM"]
    assert told["User"] != ["root"] and told["NoNewPrivileges"] == ["true"]
    (command,) = told["ExecStart"]
    words = command.split()
    drain_s = int(words[words.index("--grace") + 1]) + 20 if "--grace" in words else processes.DRAIN_S + 2 + 5
    assert int(told["TimeoutStopSec"][0]) >= drain_s


@pytest.mark.parametrize("name", UNITS)
def test_a_service_cannot_write_its_own_code(name: str) -> None:
    """`strict` leaves only its state to it, and that is where models are kept: its user has no home."""
    told = unit(name)
    (state,) = told["StateDirectory"]
    (folder,) = told["WorkingDirectory"]
    assert folder.startswith("-"), "an app that is installed as a package needs no folder"
    folder = folder.removeprefix("-")
    assert told["ProtectSystem"] == ["strict"] and not Path(folder).is_relative_to(f"/var/lib/{state}")
    assert f"TQE_DATA_DIR=/var/lib/{state}" in told["Environment"]
    assert settings.load(env={"TQE_DATA_DIR": f"/var/lib/{state}"}).data_dir == Path(f"/var/lib/{state}")


@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_to_say_against_the_units(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "systemd" / name).read_text().replace("/opt/tqe/bin/tqe", "/bin/true")
    (tmp_path / name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True)
    assert name not in done.stderr, done.stderr


def test_the_commands_of_image_and_unit_are_ours() -> None:
    """Options that do not exist any more would be found by whoever deploys."""
    final = dockerfile.read(DEPLOY / "Dockerfile")[-1]
    commands = [
        final.words("CMD"),
        *(unit(name)["ExecStart"][0].split()[1:] for name in UNITS),
        *(SERVICES[one]["command"] for one in ("engine", "api")),
        *(pod["containers"][0]["args"] for pod in pods()),
    ]
    for verb, *words in commands:
        known = Cli({})(verb, "--help").stdout
        for word in words:
            assert not word.startswith("--") or f"{word} " in known or f"{word}/" in known, (verb, word)
