"""The gateway's Prometheus metrics, in base units. No label names a stream."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from server.streams.session import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one application, in a registry of their own, so that several applications can share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._define_streams(self.registry)
        self._define_chunks(self.registry)
        self._define_media(self.registry)
        self._define_films(self.registry)
        self._define_engine(self.registry)
        self._define_process(self.registry)
        self._create_labels()
        self.count_streams({})

    def _define_streams(self, registry: CollectorRegistry) -> None:
        self.streams = Gauge("livereel_streams", "Streams by state.", ["state"], registry=registry)
        self.viewers = Gauge(
            "livereel_viewers",
            "Connected viewers by format; events alone are a format too.",
            ["format"],
            registry=registry,
        )
        self.refused = Counter("livereel_streams_refused", "Streams refused.", ["reason"], registry=registry)

    def _define_chunks(self, registry: CollectorRegistry) -> None:
        self.chunk_seconds = Histogram(
            "livereel_chunk_seconds",
            "Time to generate one chunk.",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
            registry=registry,
        )
        self.real_time_factor = Histogram(
            "livereel_chunk_real_time_factor",
            "Generation time over playback time, by chunk; below 1 is faster than real time.",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0),
            registry=registry,
        )
        self.first_frame_seconds = Histogram(
            "livereel_time_to_first_frame_seconds",
            "From the request to the first frame ready to be sent, the queue included.",
            buckets=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
            registry=registry,
        )
        self.first_frame_phase_seconds = Histogram(
            "livereel_time_to_first_frame_phase_seconds",
            "The same by phase: waiting in the queue, for the engine to start, for the first chunk, and for its first "
            "frame to be encoded. Separately, connect: from a WebRTC offer until it is connected.",
            ["phase"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
            registry=registry,
        )
        self.slack_seconds = Histogram(
            "livereel_playout_slack_seconds",
            "How long before its deadline a chunk arrives; below 0 playback stalls.",
            buckets=(-5.0, -1.0, -0.5, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
            registry=registry,
        )
        self.steer_seconds = Histogram(
            "livereel_steer_to_picture_seconds",
            "From a prompt change to the first frame shown under it.",
            buckets=(0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0),
            registry=registry,
        )

    def _define_media(self, registry: CollectorRegistry) -> None:
        self.frame_late_seconds = Histogram(
            "livereel_frame_late_seconds",
            "How long after its deadline a frame was handed to the viewers.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "livereel_encode_seconds",
            "Time to encode one frame, which all viewers of a codec or picture format share.",
            ["codec"],
            buckets=(0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128),
            registry=registry,
        )
        self.quality_changes = Counter(
            "livereel_quality_changes",
            "Changes of a stream to fewer denoising steps per chunk (down) or more (up).",
            ["direction"],
            registry=registry,
        )
        self.quality_level = Gauge(
            "livereel_quality_level",
            "Denoising steps by which the live streams are below the model's own number, in total.",
            registry=registry,
        )
        self.outputs = Gauge("livereel_outputs", "Outputs by state.", ["state"], registry=registry)
        self.unwatched_pauses = Counter(
            "livereel_unwatched_pauses", "Streams paused because nobody watched them.", registry=registry
        )
        self.stalls = Counter("livereel_stalls", "Stalls: times that the frame due was missing.", registry=registry)
        self.stalled_seconds = Counter(
            "livereel_stalled_seconds", "Time during which the frame due was missing.", registry=registry
        )
        self.frames_shown = Counter("livereel_frames_shown", "Frames shown.", registry=registry)
        self.played_seconds = Counter(
            "livereel_played_seconds", "Playback time of the frames shown.", registry=registry
        )
        self.frames_repeated = Counter(
            "livereel_frames_repeated",
            "Frames encoded again: while playback stalls, or as a keyframe for viewers that join.",
            ["reason"],
            registry=registry,
        )
        self.frames_dropped = Counter(
            "livereel_frames_dropped",
            "Frames not sent: to one viewer, to all viewers of a codec, or to anyone.",
            ["reason"],
            registry=registry,
        )
        self.viewers_dropped = Counter(
            "livereel_viewers_dropped", "Viewers disconnected for being too slow.", registry=registry
        )

    def _define_films(self, registry: CollectorRegistry) -> None:
        self.clips = Counter("livereel_clips", "Finished clips by status.", ["status"], registry=registry)
        self.clip_seconds = Histogram(
            "livereel_clip_seconds",
            "From the start of a clip to its complete file, not counting the queue.",
            buckets=(1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
            registry=registry,
        )
        self.recordings = Gauge("livereel_recordings", "Recordings in progress.", registry=registry)
        self.stored_bytes = Gauge("livereel_stored_bytes", "Size of clips and recordings on disk.", registry=registry)

    def _define_engine(self, registry: CollectorRegistry) -> None:
        self.engine_restarts = Counter("livereel_engine_restarts", "Engine processes replaced.", registry=registry)
        self.engine_ready = Gauge("livereel_engine_ready", "1 while a stream could start, else 0.", registry=registry)
        self.engine_load = Gauge(
            "livereel_engine_load_ratio",
            "Share of the engine that the live streams need; several streams are never admitted beyond 0.9.",
            registry=registry,
        )
        self.engine_resident_bytes = Gauge(
            "livereel_engine_resident_bytes", "Memory of the engine process.", registry=registry
        )
        self.engine_step_age_seconds = Gauge(
            "livereel_engine_step_age_seconds",
            "Time since the engine's last step, as it last reported.",
            registry=registry,
        )
        self.ring_slots = Gauge(
            "livereel_ring_slots",
            "Slots for chunks between engine and gateway, by state.",
            ["state"],
            registry=registry,
        )

    def _define_process(self, registry: CollectorRegistry) -> None:
        self.loop_lag_seconds = Histogram(
            "livereel_event_loop_lag_seconds",
            "Delay of the event loop, sampled twenty times a second.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=registry,
        )
        self.tasks = Gauge("livereel_tasks", "Tasks on the event loop.", registry=registry)
        self.threads = Gauge("livereel_threads", "Threads of the gateway.", registry=registry)
        ProcessCollector(registry=registry)  # process_resident_memory_bytes, process_open_fds and the like

    def _create_labels(self) -> None:
        # A counter that exists at 0 from the start lets `rate()` see its first increment.
        for direction in ("down", "up"):
            self.quality_changes.labels(direction)
        for reason in ("slow_viewer", "slow_encoder", "slow_recorder", "unexpected_chunk"):
            self.frames_dropped.labels(reason)
        for reason in ("held", "keyframe"):
            self.frames_repeated.labels(reason)
        for reason in ("queue_full", "stream_limit"):
            self.refused.labels(reason)
        for format in ("mjpeg", "rgb24", "fmp4", "vp8", "h264", "events"):
            self.viewers.labels(format)
        for phase in ("queue", "start", "generate", "encode", "connect"):
            self.first_frame_phase_seconds.labels(phase)

    def count_streams(self, by_state: dict[State, int]) -> None:
        """Set the gauge of streams by state; states that are not given become 0."""
        for state in State:
            self.streams.labels(state.value).set(by_state.get(state, 0))

    def render(self) -> bytes:
        """The exposition text, of `CONTENT_TYPE`."""
        text: bytes = generate_latest(self.registry)
        return text
