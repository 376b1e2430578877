"""The dashboard in a real browser, on a real server."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.server import Server, serving

pytestmark = pytest.mark.slow

MISSING = "needs chromium on the PATH: apt-get install chromium"
HOSTILE = "<script>alert('script')</script><img src=x onerror=alert('img')>\u202ereversed"
# A name is printable.
HOSTILE_NAME = HOSTILE.replace("/", "|").replace("\u202e", "")
APPLICATION = f"""
import anyio
from chanflow.bus import connect
from chanflow.tasks import Progress, TaskService

class Preaching(TaskService):
    async def __aenter__(self):
        await super().__aenter__()
        for number in range(3):
            await self.bus.publish("orders", b"order %d" % number)
        async with self.bus.subscribe("orders", group="billing") as messages:
            for number in range(3):
                message = await anext(messages)
                await message.reject({HOSTILE!r})
        return self

service = Preaching(bus=connect("memory://", retention=3600.0), workers=2)

@service.task
async def report(progress: Progress, pages: int = 3, pause: float = 0.2) -> dict:
    for page in range(pages):
        await progress.update(page, pages, f"page {{page + 1}}")
        await anyio.sleep(pause)
    return {{"pages": pages}}

@service.task
async def fail(text: str) -> None:
    raise ValueError(text)

@service.task(name={HOSTILE_NAME!r})
async def hostile(size: int = 1) -> list:
    return [{HOSTILE!r}, "x" * size]
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, place: Path, *arguments: str, **options: object) -> Iterator[tuple[Page, Server]]:
    """Open the page of a service, and see at the end that nothing went wrong there."""
    (place / "application.py").write_text(APPLICATION)
    with serving(place, "serve", "application:service", "--dead-letters", "orders.dead", *arguments) as server:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        page = context.new_page()
        wrong: list[str] = []
        # What the browser itself says of an answer that is no success is no fault of the page's.
        page.on("console", lambda message: wrong.append(message.text) if is_wrong(message.type, message.text) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith(server.url) else wrong.append(request.url))
        page.goto(server.url)
        yield page, server
        assert wrong == []
        context.close()
        server.end(signal.SIGTERM, signal.SIGTERM)


def is_wrong(kind: str, text: str) -> bool:
    return kind in {"error", "warning"} and not text.startswith("Failed to load resource")


def submit(page: Page, name: str, arguments: str) -> None:
    page.select_option("#submit-name", name)
    page.fill("#submit-arguments", arguments)
    page.click("#submit-button")


def test_submit_and_watch(browser: Browser, tmp_path: Path) -> None:
    """A task that is submitted opens, its progress moves, and its result comes by itself; the figures follow."""
    with opened(browser, tmp_path) as (page, _):
        expect(page.locator("#connection")).to_have_attribute("data-state", "live")
        submit(page, "report", '{"pages": 4, "pause": 0.4}')
        progress = page.locator("#details-progress")
        expect(page.locator("#details-status")).to_have_text(re.compile("running", re.IGNORECASE))
        expect(page.locator("#details-progress-message")).to_contain_text("page 1")
        before = progress.get_attribute("value")
        expect(page.locator("#details-progress-message")).to_contain_text("page 4")
        assert progress.get_attribute("value") != before
        expect(page.locator("#details-status")).to_have_text(re.compile("success", re.IGNORECASE))
        expect(page.locator("#details-result")).to_contain_text('"pages": 4')
        page.keyboard.press("Escape")
        expect(page.locator("#tasks tr[data-status=success]")).to_have_count(1)
        expect(page.locator("#count-success")).to_have_text("1")


def test_mistakes_are_told(browser: Browser, tmp_path: Path) -> None:
    """What the service says of wrong arguments is next to the form."""
    with opened(browser, tmp_path) as (page, _):
        submit(page, "report", '{"pages": "many"}')
        expect(page.locator("#submit-message")).to_contain_text("Expected `int`, got `str` - at `$.pages`")


def test_cancel_and_retry(browser: Browser, tmp_path: Path) -> None:
    """A running task is cancelled, and one that failed is run again."""
    with opened(browser, tmp_path) as (page, server):
        submit(page, "report", '{"pages": 1000}')
        page.click("#details-cancel")
        expect(page.locator("#details-status")).to_have_text(re.compile("cancelled", re.IGNORECASE))
        page.keyboard.press("Escape")
        submit(page, "fail", '{"text": "it is broken"}')
        expect(page.locator("#details-status")).to_have_text(re.compile("failed", re.IGNORECASE))
        expect(page.locator("#details-error")).to_contain_text("it is broken")
        page.click("#details-retry")
        expect(page.locator("#details-status")).to_have_text(re.compile("failed", re.IGNORECASE))
        page.keyboard.press("Escape")
        failed = server.http.get("tasks", params={"status": "failed"}).json()["tasks"]
        assert len(failed) == 1
        assert 'chanflow_task_run_seconds_count{task="fail"} 2.0' in server.http.get("metrics").text
        page.click("#status-filter button[data-status=cancelled]")
        expect(page.locator("#tasks tr")).to_have_count(1)
        expect(page.locator("#tasks tr")).to_have_attribute("data-status", "cancelled")


def test_dead_letters(browser: Browser, tmp_path: Path) -> None:
    """They are listed with the reason as text, and replayed: one, then all."""
    with opened(browser, tmp_path) as (page, server):
        rows = page.locator("#dead-letters tr[data-message-id]")
        expect(rows).to_have_count(3)
        expect(rows.first).to_contain_text("<script>alert")
        rows.first.locator(".replay").click()
        expect(rows).to_have_count(2)
        page.locator("#dead-letters .replay-all").click()
        expect(rows).to_have_count(0)
        assert server.http.get("dead-letters").json() == {"topics": [{"topic": "orders.dead", "messages": []}]}


def test_tokens(browser: Browser, tmp_path: Path) -> None:
    """Without a token the page has nothing but a form for it; a wrong one is told, the right one opens it."""
    (tmp_path / "tokens").write_text("right\n")
    with opened(browser, tmp_path, "--token-file", "tokens") as (page, _):
        expect(page.locator("#login")).to_be_visible()
        expect(page.locator("#app")).to_be_hidden()
        assert "orders.dead" not in page.content()
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-message")).not_to_be_empty()
        expect(page.locator("#app")).to_be_hidden()
        page.fill("#token", "right")
        page.keyboard.press("Enter")
        expect(page.locator("#app")).to_be_visible()
        expect(page.locator("#connection")).to_have_attribute("data-state", "live")
        page.click("#logout")
        expect(page.locator("#login")).to_be_visible()


def test_tokens_that_may_not_do_all(browser: Browser, tmp_path: Path) -> None:
    """One that may only look sees tasks and no dead letters, and what it may not do is told; one may not even look."""
    (tmp_path / "tokens").write_text("bob[read]: looks\ncarol[submit]: submits\n")
    with opened(browser, tmp_path, "--token-file", "tokens") as (page, server):
        page.fill("#token", "submits")
        page.keyboard.press("Enter")
        expect(page.locator("#login-message")).to_contain_text("this needs a token with the scope 'read'")
        expect(page.locator("#app")).to_be_hidden()
        page.fill("#token", "looks")
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_attribute("data-state", "live")
        expect(page.locator("#dead-letters")).to_be_hidden()
        submit(page, "report", '{"pages": 1000}')
        expect(page.locator("#submit-message")).to_contain_text("this needs a token with the scope 'submit'")
        server.http.post("tasks/report", json={"pages": 1000}, headers={"Authorization": "Bearer submits"})
        page.locator("#tasks tr button").first.click()
        page.click("#details-cancel")
        expect(page.locator("#details-message")).to_contain_text("this needs a token with the scope 'admin'")


def test_hostile_names_and_results(browser: Browser, tmp_path: Path) -> None:
    """They show as text, however long, and the page stays as wide as its window."""
    with opened(browser, tmp_path, viewport={"width": 1000, "height": 700}) as (page, _):
        submit(page, HOSTILE_NAME, '{"size": 1000000}')
        expect(page.locator("#details-status")).to_have_text(re.compile("success", re.IGNORECASE))
        expect(page.locator("#details-result")).to_contain_text("<script>alert('script')</script>")
        expect(page.locator("#details-name")).to_contain_text("<script>")
        page.locator("#details-result .show-all").click()
        page.keyboard.press("Escape")
        submit(page, "fail", '{"text": "' + "<b>long</b>" * 500 + '"}')
        expect(page.locator("#details-status")).to_have_text(re.compile("failed", re.IGNORECASE))
        page.keyboard.press("Escape")
        expect(page.locator("#tasks tr")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("script").count() == 1


def test_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    """A task is found, opened and closed without a mouse, and the focus comes back to it."""
    with opened(browser, tmp_path) as (page, server):
        task_id = server.submit("report", pages=0)
        row = page.locator(f"#tasks tr[data-task-id='{task_id}']")
        expect(row).to_be_visible()
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.classList.contains('open-task')"):
                break
        page.keyboard.press("Enter")
        expect(page.locator("#details")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#details")).to_be_hidden()
        assert page.evaluate("document.activeElement.closest('tr').dataset.taskId") == task_id
        page.fill("#search", "0" * 32)
        page.keyboard.press("Enter")
        expect(page.locator("#message")).not_to_be_empty()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_theme(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """The page is dark where the system is, and fits a narrow window."""
    with opened(browser, tmp_path, color_scheme=scheme, viewport={"width": 360, "height": 700}) as (page, _):
        expect(page.locator("#connection")).to_have_attribute("data-state", "live")
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(float(part) for part in re.findall(r"[\d.]+", color)[:3])
        assert (brightness > 600) == (scheme == "light"), color
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
