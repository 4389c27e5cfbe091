"""Metrics, and the pages that the server serves."""

from typing import Any

import pytest

from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio


async def test_metrics(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        await gateway.watch(await gateway.open(duration_s=0.5))
        stream = await gateway.open()
        response = await gateway.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        for line in (
            'livereel_streams{state="ended"} 1.0',
            "livereel_frames_shown_total 8.0",
            "livereel_stalls_total 0.0",
            "livereel_stalled_seconds_total 0.0",
            'livereel_frames_dropped_total{reason="slow_viewer"} 0.0',
            'livereel_viewers{format="mjpeg"} 0.0',
            "livereel_engine_restarts_total 0.0",
            "livereel_time_to_first_frame_seconds_count 1.0",
        ):
            assert line in lines
        assert stream["id"] not in response.text


async def test_the_page_and_the_reference_come_from_here_alone(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for path in ("/", "/docs"):
            response = await gateway.http.get(path)
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "https://" not in response.text
            assert "<script>" not in response.text
        for asset in ("app.js", "style.css", "docs.js", "docs.css", "js/index.js", "js/whep.js"):
            response = await gateway.http.get(f"/assets/{asset}")
            assert response.status_code == 200
            assert "innerHTML" not in response.text
        assert (await gateway.http.get("/assets/../app.py")).status_code == 404
        assert (await gateway.http.get("/assets/%2e%2e/%2e%2e/server/app.py")).status_code == 404


async def test_one_model(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        [listed] = (await gateway.http.get("/v1/models")).json()["data"]
        assert listed["fields"]["duration_s"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}
        assert listed["fields"]["transition"]["anyOf"][0]["enum"] == ["soft", "recache", "cut"]
        assert listed["vocabulary"] is None
        assert (await gateway.http.get(f"/v1/models/{listed['id']}")).json() == listed
        error = error_of(await gateway.http.get("/v1/models/maxi"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    async with run_gateway(FakeBackend(ready_after=60), ready=False) as gateway:
        error = error_of(await gateway.http.get("/v1/models/mini"), 503)
        assert error["code"] == "engine_unavailable"
