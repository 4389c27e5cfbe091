"""The page in Chromium, against a gateway with the fake engine."""

import base64
import io
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.studio import colours, eventually, number, play, start_gateway, state, states

pytestmark = pytest.mark.browser


def test_a_prompt_becomes_video_and_changes(page: Any, tmp_path: Path) -> None:
    assert page.inner_text("#message-title") == "Type a sentence to begin"
    eventually(lambda: "256" in page.inner_text("#model"))
    play(page, "a red metal cube bouncing on grass at sunset")
    state(page, "live")
    page.wait_for_timeout(3500)
    assert number(page, "fps") == pytest.approx(16, abs=1.5)
    assert number(page, "rtf") == pytest.approx(0.33, abs=0.1)
    assert number(page, "ttff") < 2
    assert number(page, "stalls") == 0
    assert 0 < number(page, "buffer") < 3
    assert number(page, "chunk") > 1
    assert colours(page) > 2
    assert page.locator("#timeline .bar").count() > 3

    evil = "<img src=x onerror=alert(1)> a blue cone"
    play(page, evil)
    page.wait_for_selector("#log li.applied:first-child", timeout=10_000)
    assert page.inner_text("#log li:first-child").startswith(evil)
    assert page.locator("#log img").count() == 0
    assert "on screen after" in page.inner_text("#log li:first-child")
    eventually(lambda: re.match(r"\d", page.text_content("#steer")))  # figures are written four times a second
    assert 0 < number(page, "steer") < 5
    assert page.locator("#timeline .asked").count() == page.locator("#timeline .applied").count() == 1

    page.click("#pause")
    state(page, "paused")
    page.wait_for_timeout(300)
    assert number(page, "fps") == 0
    page.click("#pause")
    state(page, "live")

    page.click("#stop")
    state(page, "ended")
    assert page.inner_text("#message-title") == "Stopped"
    eventually(lambda: states(page) == ["ended"])
    assert page.complaints == []
    page.screenshot(path=tmp_path / "page.png")


def test_errors_are_shown(page: Any) -> None:
    page.press("#prompt", "Enter")
    assert "Type what you want to see" in page.inner_text("#alert")
    page.evaluate("document.getElementById('prompt').removeAttribute('maxlength')")
    play(page, "é" * 2500)
    assert "too long" in page.inner_text("#alert")
    # What only the server can know: a character that it refuses.
    play(page, "a\u0000b")
    state(page, "failed")
    assert "control character" in page.inner_text("#alert")
    assert page.inner_text("#message-title") == "That did not start"


def test_a_queue_is_shown(page: Any, gateway: tuple[subprocess.Popen[str], int]) -> None:
    for _ in range(2):
        body = {"prompt": "a ball", "duration_s": 3}
        assert page.request.post("/v1/streams", data=body).status == 201
    play(page, "a cube")
    state(page, "queued")
    assert page.inner_text("#message-title") == "Place 1 in the queue"
    eventually(lambda: page.text_content("#queue") == "1")
    state(page, "live", 20)


def test_a_lost_connection_is_tried_again(page: Any, gateway: tuple[subprocess.Popen[str], int]) -> None:
    process, port = gateway
    play(page, "a cube")
    state(page, "live")
    process.kill()
    process.wait()
    page.wait_for_selector("body[data-trouble]")
    assert page.inner_text("#message-title") == "Connection lost"
    again = start_gateway(port)
    try:
        # The new gateway has never heard of the stream, and says so.
        state(page, "failed", 20)
        play(page, "a cone")
        state(page, "live")
    finally:
        again.kill()
        again.communicate()


def test_leaving_ends_the_stream(page: Any) -> None:
    play(page, "a cube")
    state(page, "live")
    page.goto("/docs")
    page.wait_for_selector("details summary")
    assert "POST" in page.inner_text("#docs")
    eventually(lambda: states(page) == ["ended"])
    assert page.complaints == []


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_sticks_out(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    play(page, "a cube " * 40)
    state(page, "live")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_picture_goes_along_as_a_form(page: Any) -> None:
    """The video goes on from a chosen picture; while a stream plays it starts a new scene, and a bad file is named."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 40, 10)).save(out, "PNG")
    posts: list[Any] = []
    page.on("request", lambda request: posts.append(request) if request.method == "POST" else None)
    page.set_input_files("#image", {"name": "start.png", "mimeType": "image/png", "buffer": out.getvalue()})
    assert page.inner_text("#image-name") == "start.png"
    play(page, "a red ball")
    state(page, "live")
    assert posts[0].headers["content-type"].startswith("multipart/form-data; boundary=")
    assert page.inner_text("#image-name") == "Picture"
    page.set_input_files("#image", {"name": "next.png", "mimeType": "image/png", "buffer": out.getvalue()})
    assert page.is_visible("#image-thumbnail")
    play(page, "a blue ball")
    eventually(lambda: sorted(states(page)) == ["ended", "live"])
    page.click("#stop")
    page.set_input_files("#image", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    play(page, "a red ball")
    eventually(lambda: "image" in page.inner_text("#alert"))


# how frames come


def transport(page: Any) -> str:
    return page.evaluate("document.body.dataset.transport ?? ''")


def viewers(page: Any) -> int:
    return page.evaluate("fetch('/v1/streams').then(r => r.json()).then(r => r.data[0].viewers)")


def test_frames_come_over_webrtc(page: Any) -> None:
    play(page, "a red ball")
    eventually(lambda: transport(page) == "webrtc")
    eventually(lambda: colours(page) > 2)
    page.wait_for_timeout(2500)
    assert number(page, "fps") == pytest.approx(16, abs=2)
    assert 0 < number(page, "buffer") < 3
    assert number(page, "chunk") > 1
    assert viewers(page) == 1  # the WebRTC session and its event socket count once
    # A picture that stands still is no lost line.
    page.click("#pause")
    state(page, "paused")
    page.wait_for_timeout(4000)
    page.click("#pause")
    state(page, "live")
    page.wait_for_timeout(500)
    assert transport(page) == "webrtc"
    page.click("#stop")
    state(page, "ended")
    assert page.complaints == []


def test_a_refused_offer_falls_back_on_pictures(page: Any) -> None:
    page.route("**/whep", lambda route: route.fulfill(status=503, body="{}"))
    play(page, "a red ball")
    eventually(lambda: transport(page) == "websocket")
    eventually(lambda: colours(page) > 2)
    page.wait_for_timeout(2500)
    assert number(page, "fps") == pytest.approx(16, abs=2)
    assert viewers(page) == 1


def test_a_way_that_is_blocked_falls_back_on_pictures(page: Any) -> None:
    """Like a firewall: the answer arrives, but no media."""

    def block(route: Any) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        response = route.fetch()
        answer = "".join(line for line in response.text().splitlines(True) if not line.startswith("a=candidate"))
        # Nobody listens at the discard port.
        lost = "a=candidate:1 1 udp 1 127.0.0.1 9 typ host\r\n"
        body = re.sub(r"a=ice-ufrag:\S+", "a=ice-ufrag:none", answer.replace("a=ice-ufrag", lost + "a=ice-ufrag"))
        route.fulfill(response=response, body=body)

    page.route("**/whep", block)
    play(page, "a red ball")
    eventually(lambda: transport(page) == "websocket")
    eventually(lambda: colours(page) > 2)
    assert page.inner_text("#message-title") == ""


@pytest.mark.parametrize("codec", ["VP8", "H264"])
def test_chromium_decodes_both_codecs(page: Any, codec: str) -> None:
    play(page, "a red ball")
    state(page, "live")
    script = """async (codec) => {
        const [stream] = (await (await fetch("/v1/streams")).json()).data;
        const peer = new RTCPeerConnection();
        const {receiver} = Object.assign(peer.addTransceiver("video", {direction: "recvonly"}));
        const codecs = RTCRtpReceiver.getCapabilities("video").codecs;
        const wanted = codecs.filter((each) => each.mimeType === `video/${codec}`);
        const rest = codecs.filter((each) => !wanted.includes(each));
        peer.getTransceivers()[0].setCodecPreferences([...wanted, ...rest]);
        await peer.setLocalDescription();
        const response = await fetch(stream.whep_url, {
            method: "POST", headers: {"Content-Type": "application/sdp"}, body: peer.localDescription.sdp,
        });
        await peer.setRemoteDescription({type: "answer", sdp: await response.text()});
        const video = document.createElement("video");
        video.muted = true;
        video.srcObject = new MediaStream([receiver.track]);
        video.play();
        for (let tries = 0; tries < 100; tries += 1) {
            await new Promise((done) => setTimeout(done, 100));
            const stats = [...(await receiver.getStats()).values()];
            const inbound = stats.find((each) => each.type === "inbound-rtp");
            if (inbound?.framesDecoded > 20) {
                const {mimeType} = stats.find((each) => each.id === inbound.codecId);
                return [mimeType, inbound.framesDecoded, inbound.framesDropped, inbound.pliCount, video.videoWidth];
            }
        }
        return [];
    }"""
    mime, decoded, dropped, asked, width = page.evaluate(script, codec)
    assert mime == f"video/{codec}"
    assert decoded > 20
    assert dropped + asked <= 1
    assert width == 256


def test_fragments_play_through_media_source(page: Any, browser: Any) -> None:
    play(page, "a red ball")
    state(page, "live")
    [stream] = page.evaluate("fetch('/v1/streams').then(r => r.json()).then(r => r.data)")
    # Our own page's policy lets no media in but by WebRTC; and a page from nowhere may not connect to this machine.
    player = browser.new_page(bypass_csp=True)
    player.goto(page.url)
    script = """async (url) => {
        const video = document.createElement("video");
        video.muted = true;
        const source = new MediaSource();
        video.src = URL.createObjectURL(source);
        await new Promise((open) => source.onsourceopen = open);
        const buffer = source.addSourceBuffer('video/mp4; codecs="avc1.42c015"');
        const socket = new WebSocket(url);
        socket.binaryType = "arraybuffer";
        const waiting = [];
        const append = () => { if (!buffer.updating && waiting.length) buffer.appendBuffer(waiting.shift()); };
        buffer.onupdateend = append;
        socket.onmessage = ({data}) => {
            if (typeof data !== "string") { waiting.push(data.slice(16)); append(); }
        };
        for (let tries = 0; tries < 100 && !video.error; tries += 1) {
            await new Promise((done) => setTimeout(done, 100));
            if (!video.buffered.length) continue;
            if (video.paused) { video.currentTime = video.buffered.start(0); video.play(); }
            if (video.getVideoPlaybackQuality().totalVideoFrames > 20) break;
        }
        const seen = video.getVideoPlaybackQuality().totalVideoFrames;
        return [video.error?.message ?? "", seen, video.buffered.length, video.videoWidth];
    }"""
    error, frames, ranges, width = player.evaluate(script, stream["ws_url"] + "?format=fmp4")
    assert error == ""
    assert frames > 20
    assert ranges == 1
    assert width == 256
    player.close()


FILM = """async (url) => {
    const video = document.createElement("video");
    const found = {};
    await new Promise((loaded, failed) => {
        video.onloadedmetadata = loaded;
        video.onerror = () => failed(video.error.message);
        video.src = url;
    });
    found.duration = video.duration;
    found.size = [video.videoWidth, video.videoHeight];
    found.places = [];
    for (const place of [1.5, 0.2]) {
        video.currentTime = place;
        await new Promise((sought) => video.onseeked = sought);
        found.places.push(video.currentTime);
    }
    return found;
}"""


@pytest.mark.parametrize("kind", ["clip", "mp4", "webm"])
def test_a_film_plays_and_can_be_sought_in(browser: Any, gateway: tuple[subprocess.Popen[str], int], kind: str) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{gateway[1]}/v1", timeout=20) as http:
        if kind == "clip":
            film = f"/videos/{http.post('/videos', json={'prompt': 'a', 'seconds': '2'}).json()['id']}/content"
        else:
            stream = http.post("/streams", json={"prompt": "a", "duration_s": 2}).json()["id"]
            film = (
                f"/recordings/{http.post(f'/streams/{stream}/recordings', json={'format': kind}).json()['id']}/content"
            )
        http.get(film)  # as long as it is being made
        response = http.get(film)
    data = f"data:{response.headers['content-type']};base64,{base64.b64encode(response.content).decode()}"
    page = browser.new_page()
    found = page.evaluate(FILM, data)
    page.close()
    assert found == {"duration": pytest.approx(2, abs=0.01), "size": [256, 256], "places": [1.5, 0.2]}
