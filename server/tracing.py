"""OpenTelemetry spans: request -> admit, and chunk -> generate, encode, send. Without an exporter there are none.

A span holds times and the stream's id, never a prompt, a key or a token. The engine exports no spans: `wire.Frames`
carries the time that it took for a chunk.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import request_id
from server.media.frames import Frame

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Attributes = Mapping[str, str | int | float]
Period = tuple[float, float]
"""Start and end, on the monotonic clock in seconds."""

MAX_CHUNKS = 8
"""Chunks of one stream whose spans are not complete; the gateway is never this far behind."""


@dataclass(slots=True)
class Chunk:
    """A chunk between the engine and the viewers."""

    index: int
    frames: int
    generated: Period
    first: Frame
    """The first frame; its times are those of the chunk's spans."""
    sent: Period | None = None


class Tracing:
    """Makes spans. Without a provider every method returns at once, and the SDK is not loaded."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("livereel") if provider else None

    @property
    def on(self) -> bool:
        """Whether spans are exported."""
        return self._tracer is not None

    @contextmanager
    def request(self, method: str, path: str, carrier: Mapping[str, str]) -> "Iterator[Span | None]":
        """The span of a request: a child of its `traceparent`, and the parent of spans started inside."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        with self._tracer.start_as_current_span(
            f"{method} request",
            TraceContextTextMapPropagator().extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": method, "url.path": path, "livereel.request_id": request_id.get()},
            record_exception=False,  # its text could contain anything
        ) as span:
            yield span

    def span(self, name: str, period: Period, attributes: Attributes) -> "Span | None":
        """A finished span, as a child of the current one. Returns it, so that it can be made a parent."""
        if self._tracer is None:
            return None
        span = self._tracer.start_span(name, attributes=attributes, start_time=nanoseconds(period[0]))
        span.end(nanoseconds(period[1]))
        return span

    def chunk(self, stream: str, chunk: Chunk) -> None:
        """Export the spans of a chunk, if it has been sent."""
        if self._tracer is None or chunk.sent is None:
            return
        from opentelemetry.trace import use_span

        attributes: Attributes = {
            "livereel.stream": stream,
            "livereel.chunk": chunk.index,
            "livereel.frames": chunk.frames,
        }
        whole = self.span("chunk", (chunk.generated[0], chunk.sent[1]), attributes)
        assert whole is not None
        with use_span(whole):
            self.span("generate", chunk.generated, attributes)
            if chunk.first.encode_period is not None:
                self.span("encode", chunk.first.encode_period, attributes)
            self.span("send", chunk.sent, attributes)

    def close(self) -> None:
        """Export the remaining spans. Blocks for a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


class Chunks:
    """The chunks of one stream that are between the engine and the viewers."""

    def __init__(self, tracing: Tracing, stream: str) -> None:
        self._tracing, self._stream = tracing, stream
        self._chunks: deque[Chunk] = deque(maxlen=MAX_CHUNKS)

    def arrived(self, index: int, frames: list[Frame], generated: Period) -> None:
        """A chunk has arrived from the engine."""
        if self._tracing.on and frames:
            self._chunks.append(Chunk(index, len(frames), generated, frames[0]))

    def sent(self, frame: Frame, period: Period) -> None:
        """A frame has been handed to the viewers. The first frame of a chunk completes the chunks before it."""
        for chunk in self._chunks:
            if chunk.first is frame:
                while self._chunks[0] is not chunk:
                    self._tracing.chunk(self._stream, self._chunks.popleft())
                chunk.sent = period
                return

    def over(self) -> None:
        """The stream has ended: export what is complete."""
        while self._chunks:
            self._tracing.chunk(self._stream, self._chunks.popleft())


def nanoseconds(monotonic: float) -> int:
    """Convert a time of the monotonic clock to nanoseconds since 1970."""
    return time.time_ns() + round((monotonic - time.monotonic()) * 1e9)


def from_environment(environment: Mapping[str, str]) -> Tracing:
    """Tracing to `OTEL_EXPORTER_OTLP_ENDPOINT`, or disabled if that is unset. Raises `ValueError` for the operator."""
    if not environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: pip install '.[otel]'"
        ) from None
    name = environment.get("OTEL_SERVICE_NAME", "livereel")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
