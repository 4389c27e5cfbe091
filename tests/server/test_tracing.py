"""Spans of requests and of what they start, as an exporter in memory gets them."""

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server import tracing
from server.tracing import Tracing

pytestmark = pytest.mark.anyio

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def named(spans: tuple[ReadableSpan, ...], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


@pytest.mark.parametrize("format", ["mjpeg", "fmp4"])
async def test_a_stream_from_its_request_on(
    run_gateway: Any, traced: Tracing, exporter: InMemorySpanExporter, format: str
) -> None:
    async with run_gateway(tracing=traced) as gateway:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"prompt": "a very private ball", "duration_s": 2}
        response = await gateway.http.post("/v1/streams", json=body, headers=headers)
        stream = response.json()
        seen = await gateway.watch(stream, f"?format={format}")
        assert seen.close_code == 1000
        await gateway.http.get("/v1/streams/none?token=private")
    spans = exporter.get_finished_spans()
    [post] = named(spans, "POST request")
    assert post.context.trace_id == int(TRACE, 16)
    assert post.parent.span_id == int(PARENT, 16)
    assert post.attributes["http.response.status_code"] == 201
    assert post.attributes["livereel.request_id"] == "mine"
    [admit] = named(spans, "admit")
    assert admit.parent.span_id == post.context.span_id
    chunks = named(spans, "chunk")
    assert [span.attributes["livereel.chunk"] for span in chunks] == list(range(len(seen.of("chunk"))))
    assert all(span.parent.span_id == post.context.span_id for span in chunks)
    for chunk in chunks:
        below = {span.name: span for span in spans if span.parent and span.parent.span_id == chunk.context.span_id}
        assert below.keys() == {"generate", "encode", "send"}
        assert below["generate"].end_time - below["generate"].start_time == pytest.approx(0.02e9, rel=0.01)
        assert below["send"].end_time == pytest.approx(chunk.end_time, abs=1e6)
        assert below["generate"].end_time <= below["send"].end_time
        assert all(span.start_time <= span.end_time for span in below.values())
    refused = next(span for span in named(spans, "GET request") if span.attributes["http.response.status_code"] == 404)
    assert refused.context.trace_id != post.context.trace_id
    assert "private" not in str([span.to_json() for span in spans])


async def test_a_failure_says_nothing_of_its_cause(
    run_gateway: Any, traced: Tracing, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("very private")

    async with run_gateway(tracing=traced) as gateway:
        monkeypatch.setattr("server.api.streams.stream_object", fail)
        assert (await gateway.http.post("/v1/streams", json={"prompt": "a"})).status_code == 500
    [post] = named(exporter.get_finished_spans(), "POST request")
    assert post.attributes["http.response.status_code"] == 500
    assert "private" not in post.to_json()


async def test_without_an_exporter_nothing_is_kept(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        await gateway.until(lambda: live.session.frames_generated > 20)
        assert not live._chunks._chunks


def test_it_is_off_unless_asked_for() -> None:
    assert not tracing.from_environment({}).on
    assert not tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}).on
    on = tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert on.on
    on.close()
    code = "import server.__main__, sys; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_an_extra_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"\[otel\]"):
        tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
