"""A WHEP player of GStreamer's webrtcbin, for the system's Python: prints the times of the frames it decodes, as JSON.

python3 gst_player.py URL KEY VP8|H264 SECONDS
"""

import json
import os
import sys
import time
import urllib.request

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstSdp", "1.0")
gi.require_version("GstWebRTC", "1.0")
from gi.repository import GLib, Gst, GstSdp, GstWebRTC  # noqa: E402

URL, KEY, CODEC, SECONDS = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
DECODE = {"VP8": "rtpvp8depay ! vp8dec", "H264": "rtph264depay ! avdec_h264"}[CODEC]

Gst.init(None)
loop, pipeline = GLib.MainLoop(), Gst.Pipeline()
webrtc = Gst.ElementFactory.make("webrtcbin")
webrtc.set_property("bundle-policy", GstWebRTC.WebRTCBundlePolicy.MAX_BUNDLE)
pipeline.add(webrtc)
caps = f"application/x-rtp,media=video,encoding-name={CODEC},payload=96,clock-rate=90000"
caps += ",rtcp-fb-nack-pli=true,rtcp-fb-nack=true"
if CODEC == "H264":
    caps += ",packetization-mode=(string)1,profile-level-id=(string)42e01f"
frames, sizes, posted = [], set(), []


def fail(*error):
    sys.__excepthook__(*error)
    os._exit(1)


sys.excepthook = fail  # a callback's error would only be printed


def on_frame(_sink, _buffer, pad):
    frames.append(time.monotonic())
    shape = pad.get_current_caps().get_structure(0)
    sizes.add((shape.get_value("width"), shape.get_value("height")))


def on_pad(_webrtc, pad):
    # The sink shows each frame when it is due, as a window would.
    shown = Gst.parse_bin_from_description(f"{DECODE} ! queue ! fakesink name=out sync=true signal-handoffs=true", True)
    shown.get_by_name("out").connect("handoff", on_frame)
    pipeline.add(shown)
    shown.sync_state_with_parent()
    pad.link(shown.get_static_pad("sink"))


def on_gathered(_webrtc, _state):
    if webrtc.get_property("ice-gathering-state") != GstWebRTC.WebRTCICEGatheringState.COMPLETE or posted:
        return
    offer = webrtc.get_property("local-description").sdp.as_text()
    headers = {"Content-Type": "application/sdp", "Authorization": f"Bearer {KEY}"}
    posted.append(time.monotonic())
    with urllib.request.urlopen(urllib.request.Request(URL, offer.encode(), headers), timeout=10) as response:
        text = response.read()
    _, message = GstSdp.SDPMessage.new()
    GstSdp.sdp_message_parse_buffer(text, message)
    answer = GstWebRTC.WebRTCSessionDescription.new(GstWebRTC.WebRTCSDPType.ANSWER, message)
    webrtc.emit("set-remote-description", answer, Gst.Promise.new())
    GLib.timeout_add(round(SECONDS * 1000), loop.quit)


def on_offer(promise):
    promise.wait()
    reply = promise.get_reply()  # owns the offer
    webrtc.emit("set-local-description", reply.get_value("offer"), Gst.Promise.new())


webrtc.connect("pad-added", on_pad)
webrtc.connect("notify::ice-gathering-state", on_gathered)
webrtc.emit("add-transceiver", GstWebRTC.WebRTCRTPTransceiverDirection.RECVONLY, Gst.Caps.from_string(caps))
pipeline.set_state(Gst.State.PLAYING)
webrtc.emit("create-offer", None, Gst.Promise.new_with_change_func(on_offer))
GLib.timeout_add_seconds(30 + round(SECONDS), loop.quit)
loop.run()
pipeline.set_state(Gst.State.NULL)
print(json.dumps({"posted": sum(posted), "frames": frames, "sizes": sorted(sizes)}))
