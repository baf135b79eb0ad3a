"""Redis behind TLS with a certificate of one's own: workers, the REST API and the command reach it."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.web import Web, serve

APP = """
from tqe import App

app = App()

@app.task("DOUBLE")
def double(n: int) -> int:
    return 2 * n
"""


def certificate(folder: Path) -> tuple[Path, Path]:
    """One that signs itself, for localhost, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def test_run_serve_and_submit(make_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = {"tls_port": str(port), "tls_cert_file": str(cert), "tls_key_file": str(key)}
    try:
        make_redis(tls_ca_cert_file=str(cert), tls_auth_clients="no", bind="127.0.0.1", **tls)
    except AssertionError as e:
        pytest.skip(f"the redis-server at hand speaks no TLS: {str(e)[-200:]}")
    (tmp_path / "work.py").write_text(APP)
    env = {"TQE_REDIS_URL": f"rediss://localhost:{port}/0?ssl_ca_certs={cert}"}
    cli = Cli(env)
    with contextlib.ExitStack() as ends:
        web = Web(serve(tmp_path, env, "work:app"))
        ends.callback(web.program.close)
        running = Program(tmp_path, env, ("run", "work:app", "--procs", "1"))
        ends.callback(running.close)
        names = [cli.json("submit", "DOUBLE", '{"n": 4}')["id"]]
        names.append(web.post("/api/v1/jobs", {"type": "DOUBLE", "payload": {"n": 4}}).json["id"])
        for name in names:
            wait_until(lambda name=name: cli.json("job", name)["result"] == 8, 40, running.text())
        assert "cannot" in Cli({"TQE_REDIS_URL": f"rediss://localhost:{port}/0"})("status").stderr
