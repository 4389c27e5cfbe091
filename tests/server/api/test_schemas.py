"""Invalid request bodies: a clear error that names the field, and a server that is not affected."""

import json
from typing import Any

import pytest

from server.api.schemas import MAX_SEED
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


CREATE = [
    ("{}", "prompt", "missing_field"),
    ('{"prompt": ""}', "prompt", "prompt_empty"),
    ('{"prompt": "   "}', "prompt", "prompt_empty"),
    ('{"prompt": "\\u3000"}', "prompt", "prompt_empty"),
    ('{"prompt": null}', "prompt", "invalid_value"),
    ('{"prompt": 3}', "prompt", "invalid_value"),
    ('{"prompt": ["a"]}', "prompt", "invalid_value"),
    (json.dumps({"prompt": "x" * 4097}), "prompt", "prompt_too_long"),
    (json.dumps({"prompt": "é" * 2049}), "prompt", "prompt_too_long"),
    ('{"prompt": "a\\u0000b"}', "prompt", "prompt_character"),
    ('{"prompt": "\\r\\n\\t"}', "prompt", "prompt_empty"),
    ('{"prompt": "\\u001b\\u0085 "}', "prompt", "prompt_empty"),
    ('{"prompt": "a\\ud800b"}', "prompt", "prompt_character"),
    ('{"prompt": "\\udfff"}', "prompt", "prompt_character"),
    ('{"prompt": "a", "seed": true}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": "7"}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": 1.5}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": -1}', "seed", "invalid_value"),
    (json.dumps({"prompt": "a", "seed": MAX_SEED + 1}), "seed", "invalid_value"),
    (json.dumps({"prompt": "a", "seed": 10**400}), "seed", "invalid_value"),
    ('{"prompt": "a", "seed": NaN}', "seed", "invalid_value"),
    ('{"prompt": "a", "duration_s": 0}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": -1}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": 86401}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": NaN}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": Infinity}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": -Infinity}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": 1e999}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": true}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": "5"}', "duration_s", "invalid_value"),
    (json.dumps({"prompt": "a", "duration_s": 10**400}), "duration_s", "invalid_value"),
    ('{"prompt": "a", "model": 1}', "model", "invalid_value"),
    ('{"prompt": "a", "steps": 4}', "steps", "unknown_field"),
    ('{"prompt": "a", "<b>\\u00e9": 4}', "<b>\\xe9", "unknown_field"),
    ('{"prompt": "a", "\\ud800": 4}', None, "invalid_body"),
    ("[]", None, "invalid_body"),
    ('"a"', None, "invalid_body"),
    ("null", None, "invalid_body"),
    ("", None, "invalid_body"),
    ("{", None, "invalid_json"),
    ('{"prompt": "a",}', None, "invalid_json"),
    ('{"prompt": "a\nb"}', None, "invalid_json"),
    ("[" * 20000, None, "invalid_json"),
    (b'{"prompt": "\xff"}', None, "invalid_json"),
    (json.dumps({"prompt": "a"}).encode("utf-16"), None, None),
]


async def test_create(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        for content, param, code in CREATE:
            response = await gateway.http.post("/v1/streams", content=content, headers=JSON)
            if code is None:  # valid JSON in another encoding: either answer is fine
                assert response.status_code in (201, 400)
                continue
            error = error_of(response, 400)
            assert (error["param"], error["code"]) == (param, code), content
            assert error["type"] == "invalid_request_error"
            if param:
                assert f"`{param}`" in error["message"]
        assert len(gateway.backend.sent) <= 1
        # What is right still works, at the very limits.
        seeds = [{"seed": seed} for seed in (MAX_SEED, 0, 7.0)]
        for fields in ({"prompt": "é" * 2048}, *seeds, {"duration_s": 86400}, {"model": None}):
            await gateway.open(**{"prompt": "a", **fields})


LINES = "a red ball\r\n\r\nrolls\ton\ngrass,\rfast\u2028and far\n"
ON_ONE_LINE = "a red ball  rolls on grass, fast and far"


async def test_tabs_and_line_ends_in_prompts_are_spaces(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(LINES)
        assert stream["prompt"] == ON_ONE_LINE
        changed = await gateway.patch(stream, prompt="\n" + LINES)
        assert (changed.status_code, changed.json()["prompt"]) == (200, ON_ONE_LINE)
        extra = {"prompts": [{"at_s": 0.25, "prompt": LINES}]}
        clip = await gateway.http.post("/v1/videos", json={"prompt": LINES, "seconds": "0.5", "extra": extra})
        assert (clip.status_code, clip.json()["prompt"]) == (200, ON_ONE_LINE)
        assert [each["prompt"] for each in clip.json()["extra"]["prompts"]] == [ON_ONE_LINE, ON_ONE_LINE]
        for path, status in (("/v1/streams", 201), ("/v1/videos", 200)):
            made = await gateway.http.post(path, files={"prompt": (None, LINES)})  # as `curl -F 'prompt=<file'` has it
            assert (made.status_code, made.json()["prompt"]) == (status, ON_ONE_LINE)

        async def completed() -> bool:
            return (await gateway.http.get(f"/v1/videos/{clip.json()['id']}")).json()["status"] == "completed"

        await gateway.until(completed)
        again = await gateway.http.post(f"/v1/videos/{clip.json()['id']}/remix", json={"prompt": LINES})
        assert (again.status_code, again.json()["prompt"]) == (200, ON_ONE_LINE)


TAKEN = [
    "a\x07b",
    "a\x0bb",
    "a\x1bb",
    "a\x7fb",
    "a\x85b",
    "a\u200bb",
    "\ufeffa",
    "a\uffffb",
    "voil\xc3\xa0",
    "\xc3\x85",
]


async def test_what_the_model_cleans_is_taken_as_it_is(run_gateway: Any) -> None:
    """Wan mends text with ftfy, whose evidence are C1 control characters and no-break spaces: none may be lost."""
    async with run_gateway() as gateway:
        stream = await gateway.open()
        for text in TAKEN:
            changed = await gateway.patch(stream, prompt=text)
            assert (changed.status_code, changed.json()["prompt"]) == (200, text)
        extra = {"prompts": [{"at_s": 0.25, "prompt": "a\x85b"}]}
        clip = await gateway.http.post("/v1/videos", json={"prompt": "a\x1bb", "seconds": "0.5", "extra": extra})
        assert [each["prompt"] for each in clip.json()["extra"]["prompts"]] == ["a\x1bb", "a\x85b"]
        for path, status in (("/v1/streams", 201), ("/v1/videos", 200)):
            made = await gateway.http.post(path, files={"prompt": (None, "a\x07b")})
            assert (made.status_code, made.json()["prompt"]) == (status, "a\x07b")
        described = (await gateway.http.get("/openapi.json")).text
        assert "\\\\x07" not in described


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
async def test_one_line_end_after_a_prompt_does_not_count(run_gateway: Any, ending: str) -> None:
    async with run_gateway() as gateway:
        assert (await gateway.open("x" * 4096 + ending))["prompt"] == "x" * 4096
        refused = await gateway.http.post("/v1/streams", json={"prompt": "x" * 4096 + 2 * ending})
        assert refused.json()["error"]["code"] == "prompt_too_long"


async def test_unknown_model(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        for model in ("maxi", "", "../mini", "mini\n", "\udcff"):
            body = json.dumps({"prompt": "a", "model": model})
            response = await gateway.http.post("/v1/streams", content=body, headers=JSON)
            error = error_of(response, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
            assert "mini" in error["message"]


CHANGE = [
    ("{}", None, "nothing_to_change"),
    ('{"prompt": null}', None, "nothing_to_change"),
    ('{"prompt": ""}', "prompt", "prompt_empty"),
    ('{"prompt": "a\\u0000"}', "prompt", "prompt_character"),
    ('{"prompt": "\\ud800"}', "prompt", "prompt_character"),
    (json.dumps({"prompt": "x" * 4097}), "prompt", "prompt_too_long"),
    ('{"prompt": 1}', "prompt", "invalid_value"),
    ('{"prompt": "a", "transition": "fade"}', "transition", "invalid_value"),
    ('{"prompt": "a", "transition": 1}', "transition", "invalid_value"),
    ('{"transition": "cut"}', "prompt", "missing_field"),
    ('{"paused": 1}', "paused", "invalid_value"),
    ('{"paused": "true"}', "paused", "invalid_value"),
    ('{"seed": 1}', "seed", "unknown_field"),
]


async def test_change(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        for content, param, code in CHANGE:
            response = await gateway.http.patch(f"/v1/streams/{stream['id']}", content=content, headers=JSON)
            error = error_of(response, 400)
            assert (error["param"], error["code"]) == (param, code), content
        assert (await gateway.get(stream))["prompt"] == "a red ball"


async def test_a_refused_change_leaves_the_stream_as_it_was(run_gateway: Any, error_of: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, refuse_steers=True)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        error = error_of(await gateway.patch(stream, prompt="a cube"), 409)
        assert error["code"] == "steer_refused"
        assert (await gateway.get(stream))["prompt"] == "a red ball"
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 20)
        assert not seen.of("prompt.applied")


async def test_an_unknown_field_is_named_by_its_path(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        for extra, path in (
            ({"sed": 1}, "extra.sed"),
            ({"prompts": [{"at_s": 1, "prompt": "a", "when": 2}]}, "extra.prompts[0].when"),
        ):
            answer = await gateway.http.post("/v1/videos", json={"prompt": "a", "extra": extra})
            error = error_of(answer, 400)
            assert (error["code"], error["param"]) == ("unknown_field", path)
            assert f"`{path}`" in error["message"]
