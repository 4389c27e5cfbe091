"""A page with a WHEP reader that is not ours, in the manner of MediaMTX's: it offers video, sound and a data channel,
trickles its candidates with `If-Match`, and reads the stream by the offer's first `ice-ufrag`."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("READER_SECONDS", "30"))

READER = """async ({url, seconds, sections, policy, match, codec}) => {
    const found = {posted: null, patched: [], frames: [], state: "", width: 0, mime: ""};
    const peer = new RTCPeerConnection({bundlePolicy: policy});
    const video = document.createElement("video");
    video.muted = true;
    document.body.append(video);
    let session = null, etag = null, description = null;
    const queued = [];
    const first = (pattern) => description.match(pattern)[1];
    const trickle = async (candidates) => {
        const mids = [...description.matchAll(/^m=.*$[^]*?^a=mid:(.*)$/gm)];
        const lines = [`a=ice-ufrag:${first(/a=ice-ufrag:(.*)/)}`, `a=ice-pwd:${first(/a=ice-pwd:(.*)/)}`];
        mids.forEach(([section, mid], index) => {
            const own = candidates.filter((each) => each.sdpMLineIndex === index);
            if (own.length) lines.push(section.split(/\\r?\\n/)[0], `a=mid:${mid}`);
            lines.push(...own.map((each) => "a=" + each.candidate));
        });
        const response = await fetch(session, {
            method: "PATCH",
            headers: {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": match === "*" ? "*" : etag},
            body: lines.join("\\r\\n") + "\\r\\n",
        });
        found.patched.push(response.status);
    };
    peer.onicecandidate = ({candidate}) => {
        if (!candidate) return;
        if (session) trickle([candidate]);
        else queued.push(candidate);
    };
    peer.ontrack = ({track}) => {
        video.srcObject = new MediaStream([track]);
        video.play();
    };
    for (const section of sections) {
        if (section === "data") peer.createDataChannel("");
        else peer.addTransceiver(section, {direction: "recvonly"});
    }
    if (codec) {
        const {codecs} = RTCRtpReceiver.getCapabilities("video");
        const wanted = codecs.filter(({mimeType}) => mimeType === codec);
        peer.getTransceivers().find(({receiver}) => receiver.track.kind === "video").setCodecPreferences(wanted);
    }
    const offer = await peer.createOffer();
    description = offer.sdp;
    await peer.setLocalDescription(offer);
    const response = await fetch(url, {method: "POST", headers: {"Content-Type": "application/sdp"}, body: offer.sdp});
    found.posted = [response.status, response.headers.get("ETag"), response.headers.get("Accept-Patch")];
    const text = await response.text();
    if (!response.ok) return {...found, error: text};
    etag = response.headers.get("ETag");
    await peer.setRemoteDescription({type: "answer", sdp: text});
    session = new URL(response.headers.get("Location"), url).href;
    if (queued.length) await trickle(queued);
    const end = performance.now() + 1000 * (seconds + 5);
    while (performance.now() < end) {
        await new Promise((done) => setTimeout(done, 250));
        const {totalVideoFrames} = video.getVideoPlaybackQuality();
        found.frames.push(totalVideoFrames);
        if (totalVideoFrames >= 16 * seconds) break;
    }
    for (const each of (await peer.getStats()).values()) {
        if (each.type === "codec" && each.mimeType.startsWith("video/")) found.mime = each.mimeType;
    }
    found.state = peer.connectionState;
    found.width = video.videoWidth;
    peer.close();
    return found;
}"""


def longest_stop(counts: list[int]) -> float:
    """Seconds in which no frame came, from the first frame on: `counts` has the frames so far, every 250 ms."""
    started = [count for count in counts if count]
    return max((started.count(count) - 1) / 4 for count in set(started))


@pytest.fixture(scope="module")
def stream(browser: Any) -> Iterator[Any]:
    """A page from the gateway's own origin, and the URL of a stream of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "--backend", "fake", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Livereel is ready")
    try:
        made = httpx.post(f"http://127.0.0.1:{port}/v1/streams", json={"prompt": "a red ball"}).json()
        page = browser.new_page(bypass_csp=True)
        page.goto(f"http://127.0.0.1:{port}/")
        yield page, f"http://127.0.0.1:{port}{made['whep_url']}"
    finally:
        process.kill()
        process.communicate()


def read(stream: Any, seconds: float, *sections: str, **options: str) -> dict[str, Any]:
    page, url = stream
    wanted = {"policy": "balanced", "match": "*", "codec": "", "slash": "", **options}
    arguments = {**wanted, "url": url + wanted["slash"], "seconds": seconds, "sections": sections}
    found = page.evaluate(READER, arguments)
    assert found["posted"][0] == 201, found
    assert found["posted"][1].startswith('"')
    assert found["posted"][2] == "application/trickle-ice-sdpfrag"
    assert set(found["patched"]) == {204}
    assert (found["state"], found["width"]) == ("connected", 256)
    assert found["frames"][-1] >= 16 * seconds
    return found


def test_a_reader_in_the_manner_of_mediamtx_plays(stream: Any) -> None:
    found = read(stream, SECONDS, "video", "audio", "data")
    assert longest_stop(found["frames"]) < 1


@pytest.mark.parametrize("policy", ["balanced", "max-compat", "max-bundle"])
@pytest.mark.parametrize("sections", [("audio", "video"), ("data", "audio", "video"), ("video", "video")], ids="+".join)
def test_other_sections_do_not_keep_it_from_playing(stream: Any, sections: tuple[str, ...], policy: str) -> None:
    read(stream, 1, *sections, policy=policy, match="etag", slash="/")


@pytest.mark.parametrize("codec", ["video/H264", "video/VP8"])
def test_each_codec_plays(stream: Any, codec: str) -> None:
    if codec not in stream[0].evaluate("RTCRtpReceiver.getCapabilities('video').codecs.map((each) => each.mimeType)"):
        pytest.fail(f"this Chromium has no {codec}")
    assert read(stream, 2, "video", "audio", "data", codec=codec)["mime"] == codec
