"""The figures of the gateway for Prometheus, in base units. No label ever names a stream."""

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
    """One registry per application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.streams = Gauge("livereel_streams", "Streams by state.", ["state"], registry=registry)
        self.viewers = Gauge(
            "livereel_viewers",
            "Viewers connected, by what they get; events alone are a format too.",
            ["format"],
            registry=registry,
        )
        self.refused = Counter("livereel_streams_refused", "Streams refused.", ["reason"], registry=registry)
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
            "The same by phase: waiting for a place, for the engine to begin, for the first chunk, for its first frame "
            "to be encoded. Apart from these, connect: from a WebRTC offer until it is connected.",
            ["phase"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
            registry=registry,
        )
        self.slack_seconds = Histogram(
            "livereel_playout_slack_seconds",
            "How long before it is due a chunk arrives; below 0 playback stalls.",
            buckets=(-5.0, -1.0, -0.5, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
            registry=registry,
        )
        self.steer_seconds = Histogram(
            "livereel_steer_to_picture_seconds",
            "From a prompt change to the first frame shown under it.",
            buckets=(0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0),
            registry=registry,
        )
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
            "Times that a stream got fewer denoising steps a chunk (down), or more (up).",
            ["direction"],
            registry=registry,
        )
        self.quality_level = Gauge(
            "livereel_quality_level",
            "Denoising steps that chunks of live streams lack of the model's own, in all.",
            registry=registry,
        )
        self.outputs = Gauge("livereel_outputs", "Outputs by state.", ["state"], registry=registry)
        self.unwatched_pauses = Counter(
            "livereel_unwatched_pauses", "Streams paused because nobody watched them.", registry=registry
        )
        self.stalls = Counter("livereel_stalls", "Times that a due frame was not there.", registry=registry)
        self.stalled_seconds = Counter("livereel_stalled_seconds", "Time without a due frame.", registry=registry)
        self.frames_shown = Counter("livereel_frames_shown", "Frames that were due and shown.", registry=registry)
        self.played_seconds = Counter("livereel_played_seconds", "Playback time of these.", registry=registry)
        self.frames_repeated = Counter(
            "livereel_frames_repeated",
            "Frames encoded once more: while playback stands still, or as a keyframe for who joins.",
            ["reason"],
            registry=registry,
        )
        self.frames_dropped = Counter(
            "livereel_frames_dropped",
            "Frames that a viewer did not get, or that all those of a codec did not, or nobody.",
            ["reason"],
            registry=registry,
        )
        self.viewers_dropped = Counter(
            "livereel_viewers_dropped", "Viewers disconnected for being too slow.", registry=registry
        )
        self.clips = Counter("livereel_clips", "Clips that are over, by status.", ["status"], registry=registry)
        self.clip_seconds = Histogram(
            "livereel_clip_seconds",
            "From the begin of a clip to its complete file, the queue left out.",
            buckets=(1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
            registry=registry,
        )
        self.recordings = Gauge("livereel_recordings", "Recordings that run.", registry=registry)
        self.stored_bytes = Gauge("livereel_stored_bytes", "Clips and recordings, on disk.", registry=registry)
        self.engine_restarts = Counter("livereel_engine_restarts", "Engine processes replaced.", registry=registry)
        self.engine_ready = Gauge("livereel_engine_ready", "1 while a stream could start, else 0.", registry=registry)
        self.engine_load = Gauge(
            "livereel_engine_load_ratio",
            "Share of the engine that the live streams need; more than 0.9 is never promised to several.",
            registry=registry,
        )
        self.engine_resident_bytes = Gauge(
            "livereel_engine_resident_bytes", "Memory of the engine process.", registry=registry
        )
        self.engine_step_age_seconds = Gauge(
            "livereel_engine_step_age_seconds", "Since the engine last moved, as it last said.", registry=registry
        )
        self.ring_slots = Gauge(
            "livereel_ring_slots",
            "Slots for chunks between engine and gateway, by state.",
            ["state"],
            registry=registry,
        )
        self.loop_lag_seconds = Histogram(
            "livereel_event_loop_lag_seconds",
            "How late the event loop runs what is due, sampled twenty times a second.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=registry,
        )
        self.tasks = Gauge("livereel_tasks", "Tasks on the event loop.", registry=registry)
        self.threads = Gauge("livereel_threads", "Threads of the gateway.", registry=registry)
        ProcessCollector(registry=registry)  # process_resident_memory_bytes, process_open_fds and the like
        for direction in ("down", "up"):
            self.quality_changes.labels(direction)
        # Named before they happen, so that a rate sees the first.
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
        self.count_streams({})

    def count_streams(self, by_state: dict[State, int]) -> None:
        """Set the gauge of streams; a state that is not given has none."""
        for state in State:
            self.streams.labels(state.value).set(by_state.get(state, 0))

    def render(self) -> bytes:
        """The exposition text, of `CONTENT_TYPE`."""
        text: bytes = generate_latest(self.registry)
        return text
