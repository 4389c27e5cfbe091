"""Multipart forms: their parts, headers, names and sizes are bounded."""

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


def part(name: str, value: bytes = b"a", more: str = "", headers: bytes = b"") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'.encode()
    return head + headers + b"\r\n" + value + b"\r\n"


FILE = "; filename=a.png"

FORMS = {
    "a hundred thousand parts": part("prompt") * 100_000,
    "nine fields": b"".join(part(f"f{n}") for n in range(9)),
    "two files": part("prompt") + part("image", b"", FILE) + part("more", b"", FILE),
    "a long field": part("prompt", b"a" * 66_000),
    "a long file name": part("prompt") + part("image", b"x", f"; filename={'n' * 100_000}.png"),
    "a path for a file name": part("prompt") + part("image", b"x", "; filename=../../etc/passwd"),
    "many headers of a part": part("prompt", headers=b"X-A: b\r\n" * 50_000),
    "a long header of a part": part("prompt", headers=b"X-A: " + b"b" * 500_000 + b"\r\n"),
    "a header without end": b"--x\r\nContent-Disposition: " + b"a" * 1_000_000,
    "no name": b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\na\r\n',
    "a long name": part("n" * 60_000),
    "no end": part("prompt")[:-2],
    "nothing": b"",
}


async def test_forms_are_bounded(run_gateway: Any, error_of: Any) -> None:
    """Parts, their headers, names and sizes; what is refused leaves no stream and costs no time."""
    async with run_gateway() as gateway:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        for name, body in FORMS.items():
            end = b"" if name in ("no end", "nothing", "a header without end") else b"--x--\r\n"
            async with asyncio.timeout(10):
                response = await gateway.http.post("/v1/streams", content=body + end, headers=headers)
            assert response.status_code in (400, 413), (name, response.text)
            error = error_of(response, response.status_code)
            assert len(response.content) < 1000, name
            assert "passwd" not in str(error)
        for boundary in ("", "; boundary=", f"; boundary={'b' * 5000}", '; boundary="'):
            kind = {"content-type": f"multipart/form-data{boundary}"}
            error_of(await gateway.http.post("/v1/streams", content=part("prompt"), headers=kind), 400)
        assert (await gateway.http.get("/v1/streams")).json()["data"] == []
