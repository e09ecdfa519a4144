"""The chat page in a browser, as a person uses it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from arctic_trt.triton.openai.engine import EngineError
from tests.support.scripted_engine import ScriptedEngine

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
Show = Callable[..., Page]
PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root it has none
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser, serve: Callable[..., str]) -> Iterator[Show]:
    """Open the page in front of an engine; scripts must not fail, and nothing may be asked of anybody else."""
    problems: list[str] = []
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)

    def shown(engine: ScriptedEngine, *, width: int = 1000, **options: Any) -> Page:
        url = serve(engine, **options)
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 700})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((url, "data:")) else problems.append(request.url))
        page.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
        page.goto(url)
        return page

    yield shown
    context.close()
    assert not problems


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answered(page: Page, *texts: str) -> None:
    expect(page.locator(".assistant .body")).to_have_text(list(texts))
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_conversation(show: Show) -> None:
    engine = ScriptedEngine(reply=lambda fields: ["You ", "said: ", fields["messages"][-1]["content"]], delay_s=0.01)
    page = show(engine)
    expect(page.locator("#model")).to_have_text("arctic")
    ask(page, "one")
    answered(page, "You said: one")
    expect(page.locator(".facts span")).to_have_text(re.compile(r"^3 tokens · \d+(\.\d+)? tokens/s · first after \d+\.\d\d s$"))
    page.get_by_label("Message", exact=True).fill("two")
    page.keyboard.press("Enter")
    answered(page, "You said: one", "You said: two")
    assert engine.asked[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"},
    ]
    page.reload()
    expect(page.locator(".turn")).to_have_text([re.compile("^one"), re.compile("one"), re.compile("^two"), re.compile("two")])
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text("Ask something.")).to_be_visible()
    ask(page, "three")
    answered(page, "You said: three")
    assert len(engine.asked[-1]["messages"]) == 1


def test_text_streams_and_stops(show: Show) -> None:
    engine = ScriptedEngine(reply=lambda _: ["word "] * 2000, delay_s=0.01)
    page = show(engine)
    ask(page, "go on")
    expect(page.locator(".assistant .body")).to_contain_text("word word word")
    assert engine.under_way == 1
    expect(page.locator(".facts span")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".facts span")).to_contain_text("stopped")
    engine.wait_until(lambda it: it.under_way == 0, patience_s=10)
    assert engine.cancelled == 1
    text = page.locator(".assistant .body").inner_text()
    ask(page, "and now")
    page.wait_for_function("document.querySelectorAll('.assistant').length === 2")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert engine.asked[1]["messages"][1]["content"].strip() == text.strip(), (
        "what was said before the stop belongs to the history"
    )


def test_a_model_cannot_write_markup(show: Show) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> &amp; \n```html\n<b>code</b>\n```\nafter"
    page = show(ScriptedEngine(reply=lambda _: [evil]))
    page.on("dialog", lambda dialog: pytest.fail(f"the page ran {dialog.message}"))
    ask(page, "<i>mine</i>")
    body = page.locator(".assistant .body")
    expect(body).to_contain_text("<script>alert(2)</script> &amp;")
    expect(body.locator("pre")).to_have_text("<b>code</b>")
    expect(page.locator(".user")).to_have_text("<i>mine</i>")
    assert page.locator(".turn img, .turn script, .turn b, .turn i").count() == 0


@pytest.mark.parametrize("pieces_first", [0, 2])
def test_a_failure_is_shown_and_can_be_tried_again(show: Show, pieces_first: int) -> None:
    failure = EngineError("unavailable", "The worker group is starting again.")
    engine = ScriptedEngine(failure=failure, pieces_first=pieces_first)
    page = show(engine)
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_have_text("The worker group is starting again.")
    engine.failure = None
    page.get_by_role("button", name="Try again").click()
    answered(page, "The future is open.")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert engine.asked[-1]["messages"] == [{"role": "user", "content": "hello"}]


def test_settings_and_a_key(show: Show) -> None:
    engine = ScriptedEngine()
    page = show(engine, api_key="s3cret")
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("There is no API key")
    page.get_by_label("API key").fill("s3cret")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Tokens at most").fill("2")
    page.get_by_role("button", name="Try again").click()
    answered(page, "The future ")
    expect(page.locator(".facts span")).to_contain_text("ended by the limit")
    asked = engine.asked[0]
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert (asked["temperature"], asked["max_tokens"]) == (0.7, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window(show: Show, scheme: Any) -> None:
    page = show(ScriptedEngine(reply=lambda _: ["w" * 300, "\n```\n" + "c" * 300 + "\n```\n"]), width=400)
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("button", name="Settings").click()
    ask(page, "m" * 300)
    expect(page.locator("pre")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for name in ("Settings", "New chat", "Send"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light = [sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, ink)]
    assert (light[0] > light[1]) == (scheme == "light")
