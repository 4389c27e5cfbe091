"""Everyone who takes the frames of one stream: viewers, recordings and outputs.

Frames are encoded once for each codec or picture format, however many take them.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec

from server.errors import too_many_viewers
from server.library.recording_writer import RecordingWriter
from server.media.broadcast import Broadcast
from server.media.encoder import Codec
from server.media.frames import AnyFrame, Frame, PictureEncoder, PictureFormat
from server.media.matte import Matte
from server.media.viewer import Viewer
from server.metrics import Metrics
from server.streams.session import Event

MAX_VIEWERS = 256
"""Viewers of one stream."""


class Audience:
    """The viewers, broadcasts and recordings of one stream, and the frame on screen."""

    def __init__(
        self, encoder: PictureEncoder, bitrate_kbps: int, metrics: Metrics, *, on_demand: Callable[[], None], now: float
    ) -> None:
        """`on_demand` is called when somebody has come who takes frames, perhaps the first."""
        self._encoder = encoder
        self._bitrate_kbps = bitrate_kbps
        self._metrics = metrics
        self._on_demand = on_demand
        self.fps = 0
        """Set before the first frame is shown."""
        self.viewers: set[Viewer] = set()
        self.broadcasts: dict[tuple[Codec, bool], Broadcast] = {}
        """One encoder for each codec that viewers or recordings take, without and with mattes."""
        self.recordings: set[RecordingWriter] = set()
        """The recordings that are running."""
        self.matte: Matte | None = None
        """What is transparent for viewers who take mattes; None if everything is opaque."""
        self.on_screen: Frame | None = None
        """The frame that was shown last; None before the first."""
        self.unwatched_since = now
        """When somebody last left or was last expected, on the monotonic clock."""
        self._clock = 0
        """When `on_screen` was shown, in 1/90000 s of the playback clock: media time plus stalls and pauses."""
        self._holds = 0

    # demand

    @property
    def watching(self) -> int:
        """Viewers that take frames. Viewers of events alone do not count: they may watch by another connection."""
        return sum(viewer.format != "events" for viewer in self.viewers)

    @property
    def needed(self) -> bool:
        """Whether viewers, recordings or outputs take frames. Outputs count while they reconnect, too."""
        return bool(self.watching or self.recordings or self._holds)

    def hold(self) -> None:
        """Count as needed, watched or not, until `release` is called as often."""
        self._holds += 1
        self.touch()
        self._on_demand()

    def release(self) -> None:
        """Take back one `hold`."""
        self._holds -= 1
        self.touch()
        self._on_demand()

    def touch(self) -> None:
        """Count the time without viewers from now."""
        self.unwatched_since = time.monotonic()

    # viewers

    async def packet_on_screen(self, viewer: Viewer) -> bytes | None:
        """The frame on screen as a new viewer takes it; None if there is none yet, or the viewer takes no pictures.

        Raises `ApiError` if the stream has too many viewers.
        """
        if len(self.viewers) >= MAX_VIEWERS:
            raise too_many_viewers()
        if self.on_screen is None or viewer.picture_format is None:
            return None
        return await self._encoder.encode(self._picture(self.on_screen, viewer.alpha), viewer.picture_format)

    def add(self, viewer: Viewer) -> None:
        """Send the viewer every frame and event from now on."""
        self.viewers.add(viewer)
        self._metrics.viewers.labels(viewer.format).inc()
        self._join_broadcast(viewer)
        self._on_demand()

    def remove(self, viewer: Viewer) -> None:
        """Send the viewer nothing more. Safe to call again."""
        if viewer not in self.viewers:
            return
        self.viewers.remove(viewer)
        self._metrics.viewers.labels(viewer.format).dec()
        self.touch()
        if viewer.codec and (broadcast := self.broadcasts.get((viewer.codec, viewer.alpha))):
            broadcast.leave(viewer)
            self._close_unused((viewer.codec, viewer.alpha))

    def drop(self, viewer: Viewer) -> None:
        """Remove a viewer that was too slow, and count it."""
        self.remove(viewer)
        self._metrics.viewers_dropped.inc()

    def request_key(self, viewer: Viewer) -> None:
        """Encode a keyframe soon: the viewer can show nothing before it."""
        if viewer.codec and (broadcast := self.broadcasts.get((viewer.codec, viewer.alpha))):
            broadcast.request_key()

    def publish(self, events: list[Event]) -> None:
        """Send events to every viewer, as JSON."""
        for event in events:
            text = msgspec.json.encode(event).decode()
            for viewer in self.viewers:
                viewer.event(text)

    # recordings

    def record(self, writer: RecordingWriter) -> None:
        """Give the recording every frame from now on, or from the first. If its encoder cannot be made, it ends."""
        self.recordings.add(writer)
        writer.on_end = partial(self._stop_recording, writer)
        try:
            self._feed_recording(writer)
        except Exception:
            writer.finish("failed")
            raise
        self._on_demand()

    def _feed_recording(self, writer: RecordingWriter) -> None:
        """Give an MP4 recording what is encoded for viewers; before the first frame, `show` comes back to this."""
        if writer.format == "mp4" and (broadcast := self._broadcast("h264", alpha=False)) is not None:
            broadcast.record(writer)

    def _stop_recording(self, writer: RecordingWriter) -> None:
        self.recordings.discard(writer)
        self.touch()
        if (broadcast := self.broadcasts.get(("h264", False))) is not None:
            broadcast.stop_recording(writer)
            self._close_unused(("h264", False))

    # frames

    def encode(self, frame: Frame, default: PictureFormat | None = None) -> list[asyncio.Future[bytes]]:
        """Begin to encode a frame in every picture format that somebody watches, in `default` if nobody does."""
        packets = list(self._packets(frame).values())
        return packets if packets or default is None else [self._encoder.encode(frame, default)]

    async def show(self, frame: Frame, clock: int) -> list[tuple[Viewer, bytes]]:
        """Put a frame on screen, at `clock` on the playback clock in 1/90000 s: give it to encoders and recordings.

        Returns what `deliver` sends to the viewers who take pictures, once it is encoded.
        """
        first = self.on_screen is None
        self.on_screen, self._clock = frame, clock
        if first:
            for viewer in self.viewers:
                self._join_broadcast(viewer)
            for writer in self.recordings:
                self._feed_recording(writer)
        for (_, alpha), broadcast in self.broadcasts.items():
            broadcast.show(self._picture(frame, alpha), clock)
        for writer in list(self.recordings):
            if writer.format == "webm":
                writer.add(frame, matte=self.matte)
        # A viewer who joins while this is encoded gets the frame from `packet_on_screen`.
        watching = [(viewer, format) for viewer in self.viewers if (format := viewer.picture_format)]
        packets = {which: await packet for which, packet in self._packets(frame).items()}
        return [(viewer, packets[format, viewer.alpha]) for viewer, format in watching]

    def deliver(self, packets: list[tuple[Viewer, bytes]]) -> None:
        """Send the packets to those of the viewers who are still there."""
        for viewer, packet in packets:
            if viewer in self.viewers and (dropped := viewer.frame(packet)):
                self._metrics.frames_dropped.labels("slow_viewer").inc(dropped)

    def set_matte(self, matte: Matte | None, *, paused: bool) -> None:
        """Change what is transparent. A paused stream shows the frame on screen again."""
        self.matte = matte
        for (_, alpha), broadcast in self.broadcasts.items():
            if alpha and paused and self.on_screen is not None:
                broadcast.show(self._picture(self.on_screen, alpha), self._clock)

    def close(self, close_code: int) -> None:
        """End every viewer and recording, and keep nothing but the frame on screen."""
        for viewer in list(self.viewers):
            viewer.finish(close_code)
            self.remove(viewer)
        broadcast = self.broadcasts.pop(("h264", False), None) if self.recordings else None
        if broadcast is not None:
            broadcast.finish()  # encodes what was shown, and then ends its recordings
        for writer in list(self.recordings):
            if writer.format == "webm" or broadcast is None:
                writer.finish("stream_ended")
        if frame := self.on_screen:
            # New viewers see where the stream ended, for minutes. A copy lets the rest of its chunk be freed.
            self.on_screen = replace(frame, rgb=memoryview(bytes(frame.rgb)))

    def _packets(self, frame: Frame) -> dict[tuple[PictureFormat, bool], asyncio.Future[bytes]]:
        """The frame in every picture format that somebody watches, without and with its matte."""
        wanted = {(format, viewer.alpha) for viewer in self.viewers if (format := viewer.picture_format)}
        return {(format, alpha): self._encoder.encode(self._picture(frame, alpha), format) for format, alpha in wanted}

    def _picture(self, frame: Frame, alpha: bool) -> AnyFrame:
        """The frame as it is, or above its matte."""
        return frame.stacked_on(self.matte) if alpha else frame

    # broadcasts

    def _join_broadcast(self, viewer: Viewer) -> None:
        """Serve the viewer from its codec's encoder; before the first frame, `show` comes back to this."""
        if viewer.codec and (broadcast := self._broadcast(viewer.codec, alpha=viewer.alpha)) is not None:
            broadcast.join(viewer)

    def _broadcast(self, codec: Codec, *, alpha: bool) -> Broadcast | None:
        """The encoder of this codec, started if there is none or it has failed; None before the first frame."""
        if self.on_screen is None:
            return None
        if (which := (codec, alpha)) not in self.broadcasts or self.broadcasts[which].failed:
            picture = self._picture(self.on_screen, alpha)
            broadcast = Broadcast(codec, self.fps, self._bitrate_kbps, picture, self._clock, self._metrics)
            self.broadcasts[which] = broadcast
        return self.broadcasts[which]

    def _close_unused(self, which: tuple[Codec, bool]) -> None:
        if not len(self.broadcasts[which]):
            self.broadcasts.pop(which).close()
