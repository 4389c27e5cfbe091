"""Requests that are sent again."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.api.idempotency import KEPT_SECONDS, MAX_CLAIMS, Idempotency, fingerprint
from server.auth import keys
from server.auth.revocation import end_revoked
from server.errors import ApiError
from server.uploads import images

pytestmark = pytest.mark.anyio


def make(ledger: Idempotency, key: str, print_: str = "x", *, client: int | None = 1, now: float = 0.0) -> str | None:
    """Ask for something; returns what was made before, if anything."""
    with ledger.claim(client, key, print_, now) as claim:
        assert claim.replayed == (claim.made is not None)
        before, claim.made = claim.made, claim.made or f"{client} {key}"
    return before


def refusal(ledger: Idempotency, key: str, print_: str = "x", *, client: int | None = 1) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught, ledger.claim(client, key, print_, 0.0):
        pass
    assert caught.value.param == "Idempotency-Key"
    return caught.value.status_code, caught.value.code


def test_what_was_made_is_made_once() -> None:
    ledger = Idempotency()
    assert [make(ledger, "a"), make(ledger, "a"), make(ledger, "b")] == [None, "1 a", None]


def test_another_request_with_the_same_key() -> None:
    ledger = Idempotency()
    make(ledger, "a")
    assert refusal(ledger, "a", "y") == (422, "idempotency_key_reused")


def test_while_it_is_going_on() -> None:
    ledger = Idempotency()
    with ledger.claim(1, "a", "x", 0.0) as claim:
        assert refusal(ledger, "a") == (409, "request_in_progress")
        assert refusal(ledger, "a", "y") == (422, "idempotency_key_reused")
        claim.made = "it"
    assert make(ledger, "a") == "it"


def test_who_fails_may_try_again() -> None:
    ledger = Idempotency()
    with pytest.raises(ZeroDivisionError), ledger.claim(1, "a", "x", 0.0):
        raise ZeroDivisionError
    assert make(ledger, "a", "y") is None


def test_keys_of_one_client_are_none_of_anothers() -> None:
    ledger = Idempotency()
    assert [make(ledger, "a", client=client) for client in (1, 2, None, 1)] == [None, None, None, "1 a"]
    end_revoked(ledger, {2})
    assert [make(ledger, "a", client=client) for client in (1, 2, None)] == [None, "2 a", "None a"]


def test_they_are_kept_for_a_day() -> None:
    ledger = Idempotency()
    make(ledger, "a")
    assert make(ledger, "a", now=KEPT_SECONDS - 1) == "1 a"
    assert make(ledger, "a", now=KEPT_SECONDS) is None


def test_the_store_is_bounded_and_who_has_most_pays() -> None:
    ledger = Idempotency()
    make(ledger, "mine", client=2)
    with ledger.claim(1, "slow", "x", 0.0) as claim:
        for number in range(MAX_CLAIMS + 100):
            make(ledger, str(number))
        claim.made = "late"
    assert sum(len(claims) for claims in ledger._claims.values()) == ledger._count == MAX_CLAIMS
    assert make(ledger, "mine", client=2) == "2 mine"
    assert make(ledger, str(MAX_CLAIMS + 99)) is not None
    assert make(ledger, "0") is None


@pytest.mark.parametrize("key", ["", " a", "a" * 256, "a\tb", "é", "a\x7f", "a\n"])
def test_what_is_no_key(key: str) -> None:
    assert refusal(Idempotency(), key) == (400, "invalid_idempotency_key")


def test_fingerprints() -> None:
    one = fingerprint("POST /a", {"x": 1, "y": 2}, b"")
    assert one == fingerprint("POST /a", {"y": 2, "x": 1}, b"")
    others = [
        fingerprint("POST /b", {"x": 1, "y": 2}, b""),
        fingerprint("POST /a", {"x": 1, "y": 3}, b""),
        fingerprint("POST /a", {"x": 1, "y": 2}, b"u"),
    ]
    assert len({one, *others}) == 4


BODY = {"prompt": "a red ball", "seed": 7}


async def test_fifty_identical_requests_at_once_open_one_stream(run_gateway: Any) -> None:
    async with run_gateway() as gateway:

        async def ask() -> Any:
            return await gateway.http.post("/v1/streams", json=BODY, headers={"Idempotency-Key": "race"})

        answers = await asyncio.gather(*(ask() for _ in range(50)))
        assert {answer.status_code for answer in answers} <= {201, 409}
        assert (
            Counter(answer.headers.get("idempotent-replayed") for answer in answers if answer.status_code == 201)[None]
            == 1
        )
        assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
        assert len((await gateway.http.get("/v1/streams")).json()["data"]) == 1
        # the same again, written otherwise
        again = await gateway.http.post(
            "/v1/streams",
            content=b'{ "seed": 7, "prompt": "a red ball", "model": null }',
            headers={"Idempotency-Key": "race", "content-type": "application/json"},
        )
        assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
        assert again.headers["location"] == f"/v1/streams/{again.json()['id']}"
        other = await gateway.http.post("/v1/streams", json={"prompt": "b"}, headers={"Idempotency-Key": "race"})
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_a_race_while_a_picture_is_decoded(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, may_decode = images.frames, asyncio.Event()

    async def wait_and_decode(*arguments: Any) -> bytes:
        await may_decode.wait()
        return await decode(*arguments)

    monkeypatch.setattr(images, "frames", wait_and_decode)
    async with run_gateway() as gateway:
        sent = {"data": {"prompt": "a"}, "files": {"image": PICTURE}, "headers": {"Idempotency-Key": "slow"}}
        first = asyncio.create_task(gateway.http.post("/v1/streams", **sent))
        await gateway.until(lambda: gateway.streams.uploads.waiting == 1)
        going_on = await gateway.http.post("/v1/streams", **sent)
        assert (going_on.status_code, going_on.json()["error"]["code"]) == (409, "request_in_progress")
        assert going_on.headers["retry-after"] == "1"
        may_decode.set()
        opened = await first
        assert opened.status_code == 201
        again = await gateway.http.post("/v1/streams", **sent)
        assert (again.status_code, again.json()["id"]) == (201, opened.json()["id"])


PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100"
    "c9fe92ef0000000049454e44ae426082"
)
"""A PNG of one red pixel."""


async def test_a_refused_request_may_be_sent_again_and_other_clients_have_keys_of_their_own(
    run_gateway: Any, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    shown = [keys.add_key(path, name, name, ["control"], 1, 1000) for name in ("one", "two")]
    async with run_gateway(keys=path) as gateway:

        async def ask(key: str) -> Any:
            headers = {"authorization": f"Bearer {key}", "Idempotency-Key": "same"}
            return await gateway.http.post("/v1/streams", json=BODY, headers=headers)

        mine, theirs = await ask(shown[0]), await ask(shown[1])
        assert mine.json()["id"] != theirs.json()["id"]
        again = await ask(shown[0])
        # it counts for no second stream
        assert (again.status_code, again.json()["id"]) == (201, mine.json()["id"])
        auth = {"authorization": f"Bearer {shown[0]}", "Idempotency-Key": "next"}
        full = await gateway.http.post("/v1/streams", json=BODY, headers=auth)
        assert full.json()["error"]["code"] == "stream_limit"
        await gateway.http.delete(f"/v1/streams/{mine.json()['id']}", headers=auth)
        now = await gateway.http.post("/v1/streams", json=BODY, headers=auth)
        assert (now.status_code, "idempotent-replayed" in now.headers) == (201, False)
