"""The inspector under Ray Serve, in a real headless Chromium, on a run that goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, expect, sync_playwright

from buffer.endpoint import free_port
from buffer.replay import ReplayBuffer
from buffer.trajectory import Trajectory
from tests.inspector_toy import HOSTILE, filled, make_run, spelled, sums

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
START_TIMEOUT_S = 400.0
PATIENCE_MS = 60_000.0
HELD_OUT = ("/held-out", "held-out")
expect.set_options(timeout=PATIENCE_MS)


@dataclass(frozen=True)
class Inspected:
    """A run that is being inspected."""

    url: str  # with the token
    dashboard: str
    buffer: ReplayBuffer
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def base(self) -> str:
        return self.url.partition("/?")[0]


def hostile_trajectories() -> list[Trajectory]:
    return [
        spelled(
            f"Question {number}: {text}",
            [(f" rationale {text}", False), (f" tool {text}", True)],
            answer=f"answer {text}",
            key=f"key {number} {text}",
            actor=f"actor {text}",
            task="hostile",
            log_reward=-500.0 - number,
        )
        for number, text in enumerate(HOSTILE)
    ]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspected]:
    """`amortize inspect` with a Ray of its own, whose dashboard is on."""
    folder = tmp_path_factory.mktemp("inspected")
    directory = make_run(folder / "runs", phase="training")
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "cluster", "inspect", "--run", "demo", "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # Other clusters on this machine may have left a token file, which would switch it on.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    output = folder / "output"
    with (
        filled(directory, [*sums(300), *hostile_trajectories()]) as (_, buffer),
        output.open("wb") as sink,
    ):
        process = subprocess.Popen(
            [*command, "cluster.cpus=1", "cluster.dashboard=true"],
            cwd=folder,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            said = wait_for_address(process, output)
            url, dashboard = (
                re.search(rf"{start} (http\S+)", said)
                for start in ("inspector of demo:", "listed in Ray's dashboard:")
            )
            assert url and dashboard, said
            yield Inspected(url[1], dashboard[1], buffer, process, output)
        finally:
            end(process)


def wait_for_address(process: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ctrl-C ends it" not in (said := output.read_text(errors="replace")):
        assert process.poll() is None, f"the inspector ended: {said}"
        assert time.monotonic() < deadline, f"not within {START_TIMEOUT_S} s: {said}"
        time.sleep(0.3)
    return said


def end(process: subprocess.Popen[bytes]) -> None:
    """End the inspector and what it started, in order if that can be."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=90.0)
        except subprocess.TimeoutExpired:
            for each in children:
                each.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        # Root, as in a container, cannot have the sandbox; what is shown comes from this test.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1360, "height": 900})
    opened.set_default_timeout(PATIENCE_MS)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext, inspected: Inspected) -> Iterator[Page]:
    """The table, signed in; complaints of the browser fail the test."""
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    opened.on("pageerror", lambda error: complaints.append(f"error {error}"))
    opened.on("console", lambda message: complaints.append(f"console {message.text}"))
    opened.on("requestfailed", lambda request: complaints.append(f"failed {request.url}"))
    opened.goto(inspected.url)
    expect(opened.locator("#table tbody tr")).to_have_count(50)
    yield opened
    aborted = f"failed {inspected.base}"  # a refresh that leaving the page cuts off
    assert [text for text in complaints if not text.startswith(aborted)] == []


def test_the_token_opens_the_page_and_leaves_the_address(
    page: Page, context: BrowserContext, browser: Browser, inspected: Inspected
) -> None:
    assert page.url == f"{inspected.base}/"
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""
    stranger = browser.new_context().new_page()
    answer = stranger.goto(f"{inspected.base}/")
    assert answer is not None and answer.status == 401
    expect(stranger.locator("body")).to_contain_text("wants its token")
    stranger.context.close()


def test_filters_sorting_and_pages_by_mouse(page: Page) -> None:
    page.get_by_label("search").fill("Question: 3 +")
    page.get_by_label("right").select_option("yes")
    page.get_by_label("tool used").select_option("yes")
    page.get_by_role("button", name="Apply").click()
    expected = [t for t in sums(300) if t.correct and t.prompt_key.startswith("3+")]
    expect(page.locator("#table .summary b")).to_have_text(str(len(expected)))
    expect(page.locator("tbody tr")).to_have_count(min(50, len(expected)))
    assert set(page.locator("tbody tr td:nth-child(4)").all_inner_texts()) == {"right"}
    page.get_by_role("link", name="log R", exact=True).click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("log R ↓")
    shown = [
        float(text.replace("−", "-"))
        for text in page.locator("tbody tr td:nth-child(3)").all_inner_texts()
    ]
    rewards = sorted((t.terminal_log_reward for t in expected), reverse=True)
    assert shown == pytest.approx(rewards[:50], abs=1e-3)
    page.get_by_role("link", name="log R ↓").click()
    expect(page.locator("th[aria-sort=ascending]")).to_have_text("log R ↑")
    page.get_by_role("link", name="reset").click()
    page.get_by_role("link", name="next →").click()
    expect(page.locator(".pages")).to_contain_text("page 2 of 7")


def test_a_trajectory_is_opened_by_keyboard_and_shows_its_group(page: Page) -> None:
    wanted = sums(300)[30]
    page.get_by_label("search").fill(wanted.id)
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.locator("tbody tr a.text").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_text("Question: 2 + 0 = ? Answer:")
    expect(page.locator("#rationale")).to_have_text("2 + 0 = 2, 30 30")
    expect(page.locator("#rationale mark")).to_have_text("2")
    expect(page.locator("#answer")).to_have_text(". The answer is 2.")
    expect(page.locator("#lineage")).to_contain_text("actor-0")
    expect(page.locator("figure svg")).to_have_count(4)
    page.get_by_text("As a table").click()
    expect(page.locator("details tbody tr")).to_have_count(len(wanted.stops))
    group = [t for t in sums(300) if t.prompt_key == wanted.prompt_key]
    expect(page.locator("#group article")).to_have_count(len(group))
    page.locator("#group article:not([aria-current]) a").first.click()
    expect(page.locator("#lineage code")).not_to_have_text(wanted.id)
    page.get_by_role("link", name="Curves").click()
    expect(page.locator("#curves figure")).to_have_count(3)


def test_keys_lead_through_the_table(page: Page) -> None:
    links = page.locator("tbody td:first-child a")
    for key, row in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        expect(links.nth(row)).to_be_focused()
    page.keyboard.press("n")
    expect(page.locator(".pages")).to_contain_text("page 2 of 7")
    page.keyboard.press("p")
    expect(page.locator(".pages")).to_contain_text("page 1 of 7")
    page.keyboard.press("/")
    expect(page.get_by_label("search")).to_be_focused()
    page.keyboard.type("j/n")
    expect(page.get_by_label("search")).to_have_value("j/n")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect(links.first).to_be_focused()


def test_what_a_model_writes_is_shown_and_not_obeyed(page: Page) -> None:
    page.get_by_label("task").select_option("hostile")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("tbody tr")).to_have_count(len(HOSTILE))
    for number, wanted in enumerate(hostile_trajectories()):
        page.locator(f"tbody a.text[href*='{wanted.id}']").click()
        expect(page.locator("#lineage code")).to_have_text(wanted.id)
        text = HOSTILE[number].replace("\u202e", "\\u{202e}")
        text = text.replace("\u0000", "\\u{0}").replace("\u001b", "\\u{1b}")
        assert page.locator("#rationale").text_content() == f" rationale {text} tool {text}"
        assert page.locator("#answer").text_content() == f"answer {text}"
        page.locator("#rationale").hover()
        assert page.title() == f"Question {number}: {text} · demo"
        obeyed = "main script, main img, main style, main i, #rationale *:not(mark)"
        assert page.locator(obeyed).count() == 0
        page.go_back()


def test_the_table_follows_the_run_without_being_loaded_again(
    page: Page, inspected: Inspected
) -> None:
    expect(page.locator("#live")).to_be_visible()
    page.evaluate("window.loadedOnce = true")
    inspected.buffer.seed([spelled("Question: fresh?", [(" quite fresh", False)], created_s=2e9)])
    expect(page.locator("tbody tr a.text").first).to_have_text("quite fresh")
    assert page.evaluate("window.loadedOnce") is True


def test_everything_works_without_scripts(browser: Browser, inspected: Inspected) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(inspected.url)
    page.get_by_label("tool used").select_option("no")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#table .summary b")).to_have_text("1")
    page.locator("tbody tr a.text").first.click()
    expect(page.locator("#rationale")).to_have_text("quite fresh")
    expect(page.locator("#live")).to_be_hidden()
    context.close()


def test_the_dashboard_lists_the_inspector_in_its_serve_tab(
    browser: Browser, inspected: Inspected, tmp_path: Path
) -> None:
    host = inspected.dashboard.partition("/#")[0]
    with urllib.request.urlopen(f"{host}/api/serve/applications/", timeout=60.0) as answer:
        applications = json.load(answer)["applications"]
    assert applications["inspector-demo"]["status"] == "RUNNING"
    assert applications["inspector-demo"]["route_prefix"] == "/inspect/demo"
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    page = context.new_page()
    page.goto(inspected.dashboard)
    expect(page.get_by_text("inspector-demo").first).to_be_visible(timeout=PATIENCE_MS)
    page.screenshot(path=tmp_path / "serve-tab.png")
    context.close()


def test_nothing_sticks_out_of_the_window(page: Page, inspected: Inspected, tmp_path: Path) -> None:
    # The pictures are for whoever wants to look; a busy machine's browser cannot always take one.
    detail = f"/trajectory/{sums(300)[30].id}"
    for place, name in (("/", "table"), (detail, "trajectory"), ("/curves", "curves"), HELD_OUT):
        for width in (1360, 700, 360):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(inspected.base + place)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            with suppress(Error):
                page.screenshot(path=tmp_path / f"{name}-{width}.png")


def test_ctrl_c_ends_it_with_its_ray(inspected: Inspected) -> None:
    parts = psutil.Process(inspected.process.pid).children(recursive=True)
    assert any("raylet" in part.name() for part in parts)
    inspected.process.send_signal(signal.SIGINT)
    assert inspected.process.wait(timeout=120.0) == 0, inspected.output.read_text()
    _, alive = psutil.wait_procs(parts, timeout=30.0)
    assert alive == []
    assert inspected.buffer.stats().replay_size > 300, "the run's own Redis is left alone"
