"""The studio's tools: recording and the gallery, the timeline, links for others, the keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.studio import colours, eventually, play, state

pytestmark = pytest.mark.browser

RED, BLUE = "a red ball on grass", "a blue cube on grass"


def open_card(page: Any, name: str) -> None:
    page.click(f"#{name} > summary")


def pixels(page: Any) -> str:
    """The picture on screen, to be compared."""
    return page.evaluate("document.getElementById('picture').toDataURL()")


def test_a_recording_is_made_and_played(page: Any) -> None:
    play(page, RED)
    state(page, "live")
    open_card(page, "takes")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("r")
    eventually(lambda: page.inner_text("#record") == "Stop recording")
    eventually(lambda: "running" in page.inner_text("#gallery"))
    page.wait_for_timeout(1500)
    page.keyboard.press("r")
    eventually(lambda: page.inner_text("#record") == "Record")
    eventually(lambda: page.locator("#gallery button", has_text="Play").count() == 1)
    page.click("#gallery button:has-text('Play')")
    moved = "document.getElementById('film-video').currentTime"
    eventually(lambda: page.evaluate(moved) > 0.5)
    page.click("#film-close")
    with page.expect_download() as film:
        page.click("#gallery button:has-text('Download')")
    assert Path(film.value.path()).read_bytes()[4:8] == b"ftyp"
    page.click("#gallery button:has-text('Delete')")
    eventually(lambda: "Nothing recorded" in page.inner_text("#gallery"))
    assert page.complaints == []


def test_the_last_seconds_and_the_picture_are_kept(page: Any) -> None:
    play(page, RED)
    state(page, "live")
    eventually(lambda: colours(page) > 2)
    open_card(page, "takes")
    page.click("#replay")
    page.wait_for_timeout(2500)
    page.click("#keep")
    eventually(lambda: "kept by this page" in page.inner_text("#gallery"))
    with page.expect_download() as film:
        page.click("#gallery button:has-text('Download')")
    assert Path(film.value.path()).read_bytes()[:4] == bytes.fromhex("1a45dfa3")  # EBML: WebM
    with page.expect_download() as picture:
        page.click("#snapshot")
    assert Path(picture.value.path()).read_bytes()[1:4] == b"PNG"


def test_a_clip_is_made_and_remixed(page: Any) -> None:
    open_card(page, "takes")
    page.fill("#prompt", RED)
    page.fill("#clip-seconds", "1")
    page.click("#make-clip")
    eventually(lambda: page.locator("#gallery button", has_text="Remix").count() == 1)
    page.fill("#prompt", BLUE)
    page.click("#gallery button:has-text('Remix')")
    eventually(lambda: page.locator("#gallery button", has_text="Remix").count() == 2)
    assert BLUE in page.inner_text("#gallery li:first-child")


def test_a_timeline_is_edited_saved_and_plays_the_same_frames_again(page: Any, tmp_path: Path) -> None:
    play(page, RED)
    state(page, "live")
    page.wait_for_timeout(800)
    play(page, BLUE)
    page.wait_for_selector("#log li.applied:first-child")
    page.wait_for_timeout(1500)
    open_card(page, "script")
    page.click("#script-take")
    lines = page.locator("#script-lines li")
    assert lines.count() == 2
    at = float(lines.nth(1).locator("input[type=number]").input_value())
    with page.expect_download() as saved:
        page.click("#script-save")
    script = json.loads(Path(saved.value.path()).read_text())
    assert [line["prompt"] for line in script["prompts"]] == [RED, BLUE]
    assert script["prompts"][1]["at_s"] == pytest.approx(at, abs=0.001)
    assert script["seed"] == int(page.inner_text("#seed"))

    # Twice from the file, paused where it has ended: the same seed, the same changes, the same last frame.
    page.click("#stop")
    path = tmp_path / "timeline.json"
    script["prompts"][1]["at_s"] = 1.0
    path.write_text(json.dumps(script))
    ends: list[str] = []
    opened: list[Any] = []

    def bound(route: Any) -> None:
        """Let the stream end after two seconds, so that it has a last frame."""
        if route.request.method != "POST":
            return route.continue_()
        opened.append(route.request.post_data_json)
        return route.continue_(post_data=json.dumps({**opened[-1], "duration_s": 2}))

    page.route("**/v1/streams", bound)
    page.route("**/whep", lambda route: route.fulfill(status=503, body="{}"))  # JPEGs are the same twice, RTP is not
    for _ in range(2):
        page.set_input_files("#script-file", path)
        page.wait_for_timeout(200)
        page.click("#script-play")
        state(page, "live")
        page.wait_for_selector("#log li.applied:first-child >> text=as scheduled")
        state(page, "ended")
        ends.append(pixels(page))
    assert ends[0] == ends[1]
    assert opened[0] == opened[1]
    assert opened[0]["seed"] == script["seed"]


def test_a_timeline_is_edited_and_scheduled_ahead(page: Any) -> None:
    play(page, RED)
    state(page, "live")
    open_card(page, "script")
    page.click("#script-take")
    page.fill("#prompt", BLUE)
    page.click("#script-add")
    page.locator("#script-lines li").nth(1).locator("input[type=number]").fill("6")
    page.locator("#script-lines li").nth(1).locator("select").select_option("cut")
    page.click("#script-schedule")
    eventually(lambda: BLUE in page.inner_text("#log li:first-child"))
    assert "as scheduled" in page.inner_text("#log li:first-child")
    # Moving a line exchanges the prompts, and the times stay.
    page.click("[aria-label='Move line 2 up']")
    texts = page.locator("#script-lines input[type=text]")
    assert [texts.nth(k).input_value() for k in range(2)] == [BLUE, RED]
    page.click("[aria-label='Remove line 2']")
    assert page.locator("#script-lines li").count() == 1
    page.set_input_files("#script-file", {"name": "x.json", "mimeType": "application/json", "buffer": b"{}"})
    eventually(lambda: "no timeline" in page.inner_text("#alert"))


def test_a_guest_watches_by_the_link_and_ends_nothing(page: Any, browser: Any) -> None:
    play(page, RED)
    state(page, "live")
    open_card(page, "share")
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.click("#copy-view")
    eventually(lambda: "watch=st_" in page.inner_text("#link"))
    guest = browser.new_page()
    guest.goto(page.inner_text("#link"))
    guest.wait_for_selector("body[data-state=live]")
    eventually(lambda: colours(guest) > 2)
    assert not guest.is_visible("#composer")
    guest.close()
    page.click("#copy-overlay")
    eventually(lambda: "/overlay/st_" in page.inner_text("#link"))
    page.select_option("#matte-mode", "luma")
    eventually(lambda: page.is_visible("#matte-preview"))
    page.fill("#output-url", "rtmp://elsewhere.example/app/key")
    page.click("#output-form button")
    eventually(lambda: page.is_visible("#alert"))
    assert page.evaluate("document.body.dataset.state") == "live"


def test_old_prompts_the_seed_and_the_keys(page: Any) -> None:
    play(page, RED)
    state(page, "live")
    first = page.inner_text("#seed")
    play(page, BLUE)
    page.wait_for_selector("#log li.applied:first-child")
    page.click(f"#log button:has-text('{RED}')")
    eventually(lambda: RED in page.inner_text("#log li:first-child"))
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(" ")
    state(page, "paused")
    page.keyboard.press(" ")
    state(page, "live")
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")
    page.check("#lock")
    page.click("#stop")
    play(page, RED)
    state(page, "live")
    assert page.inner_text("#seed") == first
    eventually(lambda: page.inner_text("#health-text").startswith("1:1"))
    assert page.complaints == []


def test_controls_follow_what_the_server_says_of_the_model(page: Any) -> None:
    eventually(lambda: page.is_visible("#words"))
    page.click("#words > summary")
    page.click("#word-list button:has-text('cube')")
    assert page.input_value("#prompt") == "cube"
    page.type("#prompt", " zeppelin on grass")
    assert page.inner_text("#unknown") == "mini does not know: zeppelin."
    page.click("#options > summary")
    page.fill("#option-fields input[name=duration_s]", "1.5")
    with page.expect_request(
        lambda request: request.method == "POST" and request.url.endswith("/v1/streams")
    ) as opened:
        page.press("#prompt", "Enter")
    assert opened.value.post_data_json["duration_s"] == 1.5
    state(page, "ended")
    assert not page.is_visible("#unknown")
