"""The dashboard in a real browser: headless Chromium against a running engine."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer, binaries
from tests.support.waiting import wait_until
from tests.support.web import Web, serve
from tqe.store.keys import Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WAIT_MS = 20_000  # for what the page shows; it hears of it within a second or two
HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>\"><b>bold</b>"
KEYS = Keys()

expect.set_options(timeout=WAIT_MS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

APP = f"""
import asyncio
from tqe import App

app = App("shop")

@app.task("EMAIL", priority="high")
def email(to: str = "a@example.com") -> str:
    return to

@app.task("BROKEN", max_retries=0)
def broken(text: str = "") -> None:
    raise ValueError("no good")

@app.task("HOSTILE", max_retries=0)
def hostile(text: str = "") -> None:
    raise ValueError({HOSTILE!r})

@app.task("LONG")
async def long(seconds: float = 600) -> None:
    await asyncio.sleep(seconds)

app.cron("30 3 * * *", "EMAIL", name="nightly", tz="Europe/Berlin")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer(binaries()[0])
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """`tqe run` and `tqe serve`, for all tests of this file."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "shop.py").write_text(APP)
    env = {"TQE_REDIS_URL": server.url}
    running = Program(folder, env, ("run", "shop:app", "--procs", "2", "--no-pin"))
    web = Web(serve(folder, env))
    running.says("Ctrl-C")
    yield web
    web.program.close()
    running.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        # A new profile each time, which it drops at its end.
        browser = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(chromium: Browser, engine: Web) -> Iterator[Open]:
    """`open_page()` opens the dashboard; at the end the browser must have had nothing to complain about."""
    complaints: list[str] = []
    with contextlib.ExitStack() as stack:

        def opened(web: Web = engine, path: str = "", noise: str = "^$", **options: Any) -> Page:
            options.setdefault("viewport", {"width": 1280, "height": 900})
            context = chromium.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(WAIT_MS)

            def heard(text: str) -> None:
                if not re.search(noise, text):
                    complaints.append(text)

            page.on("console", lambda said: heard(said.text) if said.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: heard(str(error)))
            page.goto(f"http://127.0.0.1:{web.port}/{path}")
            return page

        yield opened
    assert complaints == []


@pytest.fixture
def page(open_page: Open) -> Page:
    made = open_page()
    expect(made.locator("#link-text")).to_have_text("Live")
    return made


def submit(web: Web, kind: str, payload: dict[str, Any] | None = None, **options: Any) -> str:
    told = web.post("/api/v1/jobs", {"type": kind, "payload": payload or {}, **options})
    assert told.status == 202, told.body
    return str(told.json["id"])


def status(web: Web, name: str) -> str:
    return str(web.get(f"/api/v1/jobs/{name}").json["status"])


def row(page: Page, table: str, text: str) -> Any:
    return page.locator(f"{table} tr", has_text=text)


# ------------------------------------------------------------------ what it shows


def test_lanes_workers_tasks_and_schedules(page: Page, engine: Web) -> None:
    done = submit(engine, "EMAIL")
    long = submit(engine, "LONG")
    expect(page.locator("#lanes-rows th")).to_have_text(
        [re.compile(name) for name in ("high", "normal", "low")]
    )
    expect(page.locator("#workers-rows tr")).to_have_count(2)
    expect(page.locator(f'#workers-rows a[title="{long}"]')).to_be_visible(timeout=WAIT_MS)
    expect(row(page, "#tasks-rows", "EMAIL").locator("svg")).to_have_attribute(
        "aria-label", re.compile("^Run times of EMAIL: half below")
    )
    expect(row(page, "#schedules-rows", "nightly")).to_contain_text("30 3 * * * Europe/Berlin")
    expect(page.locator("#predictions-empty")).to_contain_text(re.compile("Nothing predicts"))
    assert page.locator(".chart svg .line").first.get_attribute("d")
    wait_until(lambda: status(engine, done) == "completed")
    engine("DELETE", f"/api/v1/jobs/{long}")


def test_a_job_is_found_by_its_id_and_can_be_cancelled(page: Page, engine: Web) -> None:
    later = submit(engine, "EMAIL", {"to": "ann@example.com"}, delay=600)
    page.get_by_label("Find a job by its id").fill(later)
    page.get_by_role("button", name="Find").click()
    sheet = page.locator("#job")
    expect(sheet).to_contain_text("scheduled")
    sheet.get_by_role("button", name="Cancel job").click()
    page.locator("#ask-yes").click()
    expect(sheet).to_contain_text("cancelled")
    assert status(engine, later) == "cancelled"
    sheet.get_by_role("button", name="Close").click()
    expect(sheet).not_to_be_visible()


def test_a_job_that_is_not_there(open_page: Open) -> None:
    page = open_page(path="#job/01ARZ3NDEKTSV4RRFFQ69G5F00.0", noise="404")
    expect(page.locator("#job")).to_contain_text("Nothing is known of job 01ARZ3NDEKTSV4")


def test_predictions_against_what_came(page: Page, server: RedisServer) -> None:
    trace = {"type": "EMAIL", "outcome": "done", "run_us": 20_000, "model_s": 0.01, "mean_s": 0.08}
    with contextlib.closing(server.client()) as client:
        client.delete(KEYS.traces)
        for _ in range(3):
            client.xadd(KEYS.traces, {"j": json.dumps(trace)})
        client.xadd(KEYS.traces, {"j": b"not JSON"})
        client.hset(KEYS.model, mapping={"version": "v1", "chosen": "model", "rung": "model"})
        expect(page.locator("#scatter circle")).to_have_count(3)
        facts = page.locator("#predictions-facts")
        expect(facts).to_contain_text("a factor of 2.00 in the median; 100 % within a factor of two")
        expect(facts).to_contain_text("a factor of 4.00 in the median; 0 % within a factor of two")
        client.delete(KEYS.model, KEYS.traces)


# ------------------------------------------------------------------ what it does


def test_a_lane_is_paused_purged_and_resumed(page: Page, engine: Web) -> None:
    low = row(page, "#lanes-rows", "low")
    page.get_by_role("button", name="Pause lane low").click()
    page.locator("#ask-yes").click()
    expect(low.locator(".flag")).to_be_visible()
    jobs = [submit(engine, "EMAIL", priority="low") for _ in range(3)]
    expect(low.locator("td").first).to_have_text("3")
    purge = page.get_by_role("button", name="Purge lane low")
    purge.click()
    page.locator("#ask-no").click()
    purge.click()
    expect(page.locator("#ask-text")).to_contain_text("3 jobs at the moment")
    assert [status(engine, job) for job in jobs] == ["queued"] * 3
    page.locator("#ask-yes").click()
    expect(page.locator("#toast")).to_have_text("3 jobs of lane low cancelled")
    assert [status(engine, job) for job in jobs] == ["cancelled"] * 3
    page.get_by_role("button", name="Resume lane low").click()
    expect(low.locator(".flag")).to_be_hidden()


def test_dead_letters_are_replayed_and_deleted_as_a_group(page: Page, engine: Web) -> None:
    jobs = [submit(engine, "BROKEN", {"text": str(k)}) for k in range(2)]
    wait_until(lambda: [status(engine, job) for job in jobs] == ["dead", "dead"])
    group = row(page, "#dead-rows", "no good")
    expect(group).to_contain_text("2")
    group.get_by_role("button", name="Replay").click()
    expect(page.locator("#ask-title")).to_have_text("Replay 2 jobs of BROKEN?")
    page.locator("#ask-yes").click()
    expect(page.locator("#toast")).to_have_text("2 jobs replayed")
    wait_until(lambda: engine.get("/api/v1/queues").json["totals"]["replayed"] == 2)
    wait_until(lambda: len(engine.get("/api/v1/dlq?type=BROKEN").json["jobs"]) == 2)
    group.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete 2 jobs").click()
    expect(page.locator("#toast")).to_have_text("2 dead jobs deleted")
    expect(group).to_have_count(0)


def test_a_schedule_is_paused_and_resumed(page: Page) -> None:
    page.get_by_role("button", name="Pause schedule nightly").click()
    page.locator("#ask-yes").click()
    expect(row(page, "#schedules-rows", "nightly").locator(".flag")).to_be_visible()
    page.get_by_role("button", name="Resume schedule nightly").click()
    expect(page.get_by_role("button", name="Pause schedule nightly")).to_be_visible(timeout=WAIT_MS)


# ------------------------------------------------------------------ safety


def test_markup_in_texts_of_jobs_and_workers_is_shown_as_text(
    page: Page, engine: Web, server: RedisServer
) -> None:
    name = submit(engine, "HOSTILE", {"text": HOSTILE})
    wait_until(lambda: status(engine, name) == "dead")
    record = {"worker": 7, "pid": 1, "state": HOSTILE, "host": HOSTILE}
    record["jobs"] = [{"id": HOSTILE, "type": HOSTILE, "since_ms": 5}]
    with contextlib.closing(server.client()) as client:
        client.zadd(KEYS.incarnations, {"hostile": 9e15})
        client.set(KEYS.worker("hostile"), json.dumps(record), px=60_000)
        client.sadd(KEYS.paused, HOSTILE)
        client.hset(KEYS.depth, HOSTILE, 3)
        client.rpush(KEYS.queue(HOSTILE), "frame")
        expect(row(page, "#workers-rows", HOSTILE)).to_be_visible(timeout=WAIT_MS)
        expect(row(page, "#lanes-rows", HOSTILE)).to_be_visible(timeout=WAIT_MS)
        dead = row(page, "#dead-rows", HOSTILE)
        expect(dead).to_be_visible(timeout=WAIT_MS)
        dead.locator("a").click()
        sheet = page.locator("#job")
        expect(sheet.locator("pre").first).to_contain_text(HOSTILE)
        expect(sheet.locator("pre").last).to_contain_text("<script>")
        page.keyboard.press("Escape")
        dead.get_by_role("button", name="Delete").click()
        expect(page.locator("#ask-text")).to_contain_text(HOSTILE)
        page.keyboard.press("Escape")
        for key in (KEYS.worker("hostile"), KEYS.paused, KEYS.queue(HOSTILE)):
            client.delete(key)
        client.hdel(KEYS.depth, HOSTILE)
        client.zrem(KEYS.incarnations, "hostile")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, script:not([src]), b:text-is('bold')").count() == 1  # our own sign


def test_a_text_cannot_become_markup_even_by_mistake(open_page: Open) -> None:
    page = open_page(noise="TrustedHTML|Content Security Policy|Trusted Type")
    why = page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } }")
    assert why == "TypeError"


def test_the_page_asks_for_a_token_and_keeps_it_in_the_tab(
    open_page: Open, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"TQE_REDIS_URL": server.url, "TQE_NAMESPACE": "tokens"}
    cli = Cli(env)
    reader = cli("token", "create", "reader", "--scope", "read").stdout.strip()
    web = Web(serve(tmp_path, env))
    try:
        page = open_page(web, noise="401|403")
        field = page.get_by_label("Token", exact=True)
        field.fill("tqe_wrong_00")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#token-text")).to_contain_text("does not take this token")
        field.fill(reader)
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#link-text")).to_have_text("Live")
        page.reload()
        expect(page.locator("#link-text")).to_have_text("Live")
        page.get_by_role("button", name="Pause lane low").click()
        page.locator("#ask-yes").click()
        expect(page.locator("#ask-fault")).to_contain_text("needs a token of the scope admin")
        page.locator("#ask-no").click()
        cli("token", "revoke", "reader")
        expect(page.locator("#token-text")).to_contain_text("does not take this token")
    finally:
        web.program.close()


# ------------------------------------------------------------------ when the server goes away


def test_it_says_that_it_is_stale_and_comes_back_by_itself(
    open_page: Open, server: RedisServer, tmp_path: Path
) -> None:
    env = {"TQE_REDIS_URL": server.url, "TQE_NAMESPACE": "away"}
    web = Web(serve(tmp_path, env))
    page = open_page(web, noise="ERR_|Failed to load")
    expect(page.locator("#link-text")).to_have_text("Live")
    web.program.close()
    expect(page.locator("#link-text")).to_have_text("Reconnecting")
    expect(page.locator("#alarm")).to_contain_text("What you see is")
    again = Program(tmp_path, env, ("serve", "--port", str(web.port)))
    try:
        expect(page.locator("#link-text")).to_have_text("Live")
        expect(page.locator("#alarm")).to_be_hidden()
    finally:
        again.close()


# ------------------------------------------------------------------ for everybody


@pytest.mark.parametrize("width", [320, 390, 820])
def test_no_horizontal_scroll_on_small_screens(open_page: Open, engine: Web, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 844})
    expect(page.locator("#link-text")).to_have_text("Live")
    expect(page.locator("#schedules-rows tr")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [1181, 1280, 1441])
def test_what_a_lane_lets_one_do_is_not_cut_off(open_page: Open, engine: Web, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 900})
    expect(page.locator("#lanes tbody tr")).to_have_count(3)
    assert page.eval_on_selector("#lanes .scroll", "e => e.scrollWidth - e.clientWidth") == 0


def test_the_keyboard_reaches_what_can_be_done(page: Page) -> None:
    expect(page.locator("#schedules-rows tr")).to_have_count(1)
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent")
        reached.append(str(name).strip())
    assert reached[0] == "Skip to the content"
    for wanted in ("Find", "Pause lane high", "Purge lane high", "Pause schedule nightly"):
        assert wanted in reached
    button = page.get_by_role("button", name="Purge lane high")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#ask")).to_be_visible()
    expect(page.locator("#ask-no")).to_be_focused()  # Enter must do no harm
    page.keyboard.press("Escape")
    expect(page.locator("#ask")).to_be_hidden()
    expect(button).to_be_focused()


# Every text against what lies behind it, as WCAG counts contrast.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgba(getComputedStyle(node).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const ink = light(rgba(node.closest("svg") ? style.fill : style.color));
    const ground = light(behind(node));
    const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${walker.currentNode.textContent.trim()}`);
  }
  return poor;
}"""

UNNAMED = """() => {
  const all = (what, wrong) => [...document.querySelectorAll(what)].filter(wrong);
  const named = (one) => one.ariaLabel || one.textContent.trim();
  return [
    ...all("button, a[href], [role=img]", (one) => one.checkVisibility() && !named(one)),
    ...all("input", (one) => !one.labels.length),
    ...all("section", (one) => !document.getElementById(one.getAttribute("aria-labelledby"))),
    ...all("thead th", (one) => one.scope !== "col" || !named(one)),
    ...all("tbody tr", (one) => !one.querySelector("th[scope=row]")),
  ].map((one) => one.outerHTML.slice(0, 120));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_and_everything_has_a_name(open_page: Open, engine: Web, scheme: str) -> None:
    name = submit(engine, "BROKEN")
    wait_until(lambda: status(engine, name) == "dead")
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    expect(page.locator("#link-text")).to_have_text("Live")
    expect(row(page, "#dead-rows", "no good")).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("#schedules-rows tr")).to_have_count(1)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(UNNAMED) == []
    page.get_by_role("button", name="Purge lane high").click()
    assert page.evaluate(CONTRAST) == []
