"""Makes the pictures of docs/DASHBOARD.md anew: `make screenshots`. Runs a shop of its own for two minutes.

It is the app as well: `tqe run screenshots:app` runs its tasks, which take as long and fail as often as
those of a shop would.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqe import App

HERE = Path(__file__).resolve().parent
SECONDS = 100
BYTES_MAX = 150_000

app = App("shop")


@app.task("EMAIL", priority="high", max_retries=1, backoff=1)
def email(to: str) -> str:
    time.sleep(random.lognormvariate(-4.6, 0.5))
    if "@" not in to:
        raise ValueError(f"no address: {to!r}")
    return to


@app.task("INVOICE", max_retries=0)
def invoice(pages: int) -> int:
    time.sleep(0.003 * pages * random.uniform(0.8, 1.3))
    if pages > 40 and random.random() < 0.3:
        raise TimeoutError("the printer does not answer")
    return pages


@app.task("RESIZE", max_retries=0)
def resize(width: int, height: int) -> int:
    time.sleep(width * height / 6e7 * random.uniform(0.8, 1.4))
    if random.random() < 0.004:
        raise OSError(28, "No space left on device")
    return width * height


@app.task("REPORT", priority="low")
def report(days: int) -> int:
    time.sleep(0.05 * days * random.uniform(0.7, 1.5))
    return days


@app.task("WEBHOOK")
async def webhook(url: str) -> str:
    await asyncio.sleep(random.uniform(0.02, 0.4))
    return url


app.cron("*/15 * * * *", "REPORT", {"days": 2}, name="rolling-report", tz="Europe/Berlin")
app.cron(
    "30 3 * * MON-FRI", "INVOICE", {"pages": 30}, name="nightly-invoices", tz="Europe/Berlin", jitter=600
)
app.cron(None, "WEBHOOK", {"url": "https://status.example"}, name="heartbeat", every=30)


def submit_until(closed: threading.Event) -> None:
    """Submit what a shop would, in waves: the lanes fill up and empty again."""
    wave = 0
    while not closed.wait(1):
        wave += 1
        size = 30 + 32 * (wave % 35 > 22) + random.randint(0, 12)
        mails = [f"user{k}@example.com" if random.random() > 0.01 else "nobody" for k in range(size)]
        app.submit_many([("EMAIL", {"to": to}) for to in mails])
        pages = random.choices((1, 2, 3, 5, 8, 12, 20, 45), (8, 8, 8, 6, 4, 3, 2, 1), k=size // 2)
        app.submit_many([("INVOICE", {"pages": one}) for one in pages])
        sides = [(random.choice((320, 640, 1280)), random.choice((240, 480, 960))) for _ in range(size // 2)]
        app.submit_many([("RESIZE", {"width": width, "height": height}) for width, height in sides])
        app.submit_many([("WEBHOOK", {"url": "https://example.com"}) for _ in range(size // 5)])
        if random.random() < 0.35:
            app.submit("REPORT", {"days": random.randint(1, 20)})


@contextlib.contextmanager
def program(*args: str) -> Iterator[str]:
    """A `tqe` command, until the end of the block; its log so far."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        command = [sys.executable, "-m", "tqe.cli.main", *args]
        with open(log.name, "w") as out:
            process = subprocess.Popen(command, cwd=HERE, stdout=out, stderr=subprocess.STDOUT)
        try:
            while "Ctrl-C" not in (text := Path(log.name).read_text()):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(args)} has ended:\n{text}")
                time.sleep(0.1)
            yield text
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def shoot(port: str) -> None:
    """Look at the dashboard while the shop runs, and take the pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        views = {
            "dashboard-light": {"color_scheme": "light", "viewport": {"width": 1440, "height": 900}},
            "dashboard-dark": {"color_scheme": "dark", "viewport": {"width": 1440, "height": 900}},
            "dashboard-phone": {
                "color_scheme": "light",
                "viewport": {"width": 390, "height": 844},
                "device_scale_factor": 2,
            },
        }
        pages = {}
        for name, options in views.items():
            pages[name] = browser.new_context(**options).new_page()  # type: ignore[arg-type]
            pages[name].goto(f"http://127.0.0.1:{port}/")
        # On a thread of its own: playwright has an event loop on this one, which submitting would block.
        closed = threading.Event()
        shop = threading.Thread(target=submit_until, args=(closed,))
        shop.start()
        pages["dashboard-light"].wait_for_timeout(SECONDS * 1000)
        shots = {name: page.screenshot(full_page=name != "dashboard-phone") for name, page in pages.items()}
        closed.set()
        shop.join()
        browser.close()
    for name, png in shots.items():
        save(name, png)


def save(name: str, png: bytes) -> None:
    """With as many colours as fit into the size that a repository can bear."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    path = HERE / "img" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    for colours in (192, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= BYTES_MAX:
            break
    print(f"{path.relative_to(HERE.parent)}: {path.stat().st_size:,} bytes")


def main() -> None:
    """The whole show, on an embedded Redis of its own."""
    with tempfile.TemporaryDirectory() as data:
        os.environ["TQE_DATA_DIR"] = data
        os.environ.pop("TQE_REDIS_URL", None)
        with (
            program("run", "screenshots:app", "--procs", "4", "--learn"),
            program("serve", "--port", "0") as said,
        ):
            found = re.search(r"serving +http://[^ ]*:(\d+)", said)
            assert found is not None, said
            shoot(found[1])


if __name__ == "__main__":
    main()
