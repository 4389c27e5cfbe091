"""The controls of the studio page: the prompt and what is done with it, the focus, forced colours."""

import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.studio import GATEWAY, ROOT, eventually, play, state

pytestmark = pytest.mark.browser

OWN = "a blue cone on grass"


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id")


def test_the_same_prompt_with_cut_gives_another_take(page: Any) -> None:
    play(page, OWN)
    state(page, "live")
    for takes in (1, 2):
        page.check("input[value=cut]", force=True)
        page.press("#prompt", "Enter")
        eventually(lambda takes=takes: page.locator("#log li.applied").count() == takes + 1)
    texts = page.locator("#log li.applied .when").all_inner_texts()
    assert ["on screen after" in text for text in texts] == [True, True, False]


def test_takes_that_are_asked_for_at_once_are_told_apart(page: Any) -> None:
    play(page, OWN)
    state(page, "live")
    page.check("input[value=cut]", force=True)
    page.press("#prompt", "Enter")
    page.press("#prompt", "Enter")
    eventually(lambda: page.locator("#log li.waiting").count() == 0)
    entries = page.locator("#log li .when").all_inner_texts()
    assert "on screen after" in entries[0]
    assert "on screen after" in entries[1] or "overtaken" in entries[1]


@pytest.mark.parametrize(("width", "height"), [(1280, 860), (1280, 620), (768, 1024), (390, 844), (360, 640)])
def test_a_long_prompt_is_bounded_and_scrolls(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    play(page, OWN)
    state(page, "live")
    page.evaluate("scrollTo(0, 0)")
    page.fill("#prompt", "a shiny red cube bouncing on grass at sunset. " * 88)
    box = page.evaluate(
        "(() => { const b = document.getElementById('prompt');"
        "return [b.clientHeight, b.scrollHeight, getComputedStyle(b).overflowY]; })()"
    )
    assert box[0] <= 200 and box[1] > box[0] and box[2] == "auto"
    page.evaluate("scrollTo(0, 0)")
    bottom = page.evaluate("document.getElementById('play').getBoundingClientRect().bottom")
    assert bottom <= height
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_chip_can_be_undone(page: Any) -> None:
    page.fill("#prompt", OWN)
    chip = page.locator("#examples button").first
    page.evaluate("document.getElementById('prompt').select()")
    page.keyboard.type(OWN)
    chip.click()
    assert page.input_value("#prompt") == chip.inner_text()
    state(page, "live")
    page.keyboard.press("Control+z")
    assert page.input_value("#prompt") == OWN
    page.keyboard.press("Control+Shift+z")
    assert page.input_value("#prompt") == chip.inner_text()


def test_text_from_before_is_undone_too(page: Any) -> None:
    """Also where the text was set without a key press."""
    page.fill("#prompt", OWN)
    page.locator("#examples button").nth(1).click()
    page.keyboard.press("Control+z")
    assert page.input_value("#prompt") == OWN


@pytest.mark.parametrize("key", ["Enter", "mouse"])
def test_stop_keeps_the_focus(page: Any, key: str) -> None:
    play(page, OWN)
    state(page, "live")
    if key == "mouse":
        page.click("#stop")
    else:
        page.focus("#stop")
        page.keyboard.press("Enter")
    state(page, "ended")
    page.wait_for_timeout(200)
    assert focused(page) == "play"
    page.keyboard.press("Enter")
    state(page, "live")


@pytest.mark.parametrize("control", ["#pause", "input[value=recache]"])
def test_a_stream_that_ends_keeps_the_focus(page: Any, control: str) -> None:
    play(page, OWN)
    state(page, "live")
    page.focus(control)
    page.evaluate(
        "fetch('/v1/streams').then(r => r.json()).then(r => fetch(`/v1/streams/${r.data[0].id}`, {method: 'DELETE'}))"
    )
    state(page, "ended")
    page.wait_for_timeout(200)
    assert focused(page) == "play"


def test_forced_colours_leave_every_control_an_edge(page: Any) -> None:
    page.emulate_media(forced_colors="active")
    play(page, OWN)
    state(page, "live")
    edges = """(names) => names.flatMap((name) => [...document.querySelectorAll(name)].map((element) => {
        const style = getComputedStyle(element);
        return [name, parseFloat(style.borderTopWidth) > 0 && style.borderTopStyle !== "none"];
    }))"""
    names = [
        "button",
        ".composer",
        ".transition",
        ".file span",
        ".frame",
        ".figures",
        ".card",
        "dialog",
        "dialog input",
    ]
    found = page.evaluate(edges, names)
    assert {name for name, _ in found} == set(names)
    assert [name for name, edge in found if not edge] == []
    # The chosen transition and the focus are seen as well.
    chosen = "getComputedStyle(document.querySelector('.transition input%s + span')).backgroundColor"
    assert page.evaluate(chosen % ":checked") != page.evaluate(chosen % ":not(:checked)")
    page.focus("#prompt")
    assert page.evaluate("getComputedStyle(document.getElementById('composer')).outlineStyle") == "solid"


def test_words_that_the_model_does_not_know_are_named(page: Any) -> None:
    assert not page.is_visible("#ignored")
    play(page, "a red zeppelin on Lava")
    state(page, "live")
    eventually(lambda: page.inner_text("#ignored") == "mini ignores these words: zeppelin, lava.")
    play(page, "a red ball on grass")
    eventually(lambda: not page.is_visible("#ignored"))
    play(page, "красный " + " ".join(f"w{k}" for k in range(20)))
    eventually(lambda: page.inner_text("#ignored").endswith("w9, w10 and 9 more."))
    assert "красный, w0" in page.inner_text("#ignored")


def test_words_are_named_when_the_engine_is_up(browser: Any) -> None:
    """Nobody knows the vocabulary of a stream that waits for the engine to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slow = GATEWAY.replace("restart_after", "ready_after=8, restart_after")
    process = subprocess.Popen([sys.executable, "-c", slow, "--port", str(port)], cwd=ROOT)
    try:
        page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
        eventually(lambda: answers(port))
        page.goto("/")
        play(page, "a red zeppelin")
        state(page, "queued")
        assert not page.is_visible("#ignored")
        eventually(lambda: page.inner_text("#ignored") == "mini ignores these words: zeppelin.", 15)
        page.close()
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    """Whether somebody listens at the port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_pages_have_an_icon(page: Any) -> None:
    """Without one a browser asks for /favicon.ico, and the 404 is an error in its console."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for path in ("/", "/docs", "/overlay/st_none"):
        page.goto(path)
        assert page.locator("link[rel=icon]").count() == 1
