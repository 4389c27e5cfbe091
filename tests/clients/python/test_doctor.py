"""What `livereel doctor` finds, and what it advises."""

from pathlib import Path
from typing import Any

from livereel import Client
from livereel.doctor import examine
from livereel.testing import FakeServer

from server.auth.keys import add_key


def test_all_is_well(running: Any) -> None:
    with Client(running.url) as client:
        checks = {check.name: check for check in examine(client)}
    assert all(check.ok for check in checks.values()) and "streams at once" in checks["model mini"].detail


def test_no_server(fake: FakeServer) -> None:
    fake.offline = True
    *_, last = examine(Client(transport=fake.transport))
    assert (last.name, last.ok) == ("server", False) and "livereel serve" in last.advice


def test_a_key_is_missing(run_gateway_thread: Any, tmp_path: Path) -> None:
    add_key(tmp_path / "keys.toml", "studio", "studio", ["control"], 4, 1000)
    with run_gateway_thread(keys=tmp_path / "keys.toml") as running, Client(running.url) as client:
        *_, last = examine(client)
    assert (last.name, last.ok) == ("key", False) and "LIVEREEL_API_KEY" in last.advice


def test_an_engine_that_starts(fake: FakeServer) -> None:
    fake.fail(503, "x")
    fake.models = []
    checks = {check.name: check for check in examine(Client(transport=fake.transport, max_retries=0))}
    assert not checks["engine"].ok and checks["engine"].advice


def test_a_model_that_is_too_large_for_the_machine(fake: FakeServer) -> None:
    from dataclasses import replace

    fake.models = [replace(fake.models[0], capacity=0)]
    *_, last = examine(Client(transport=fake.transport))
    assert (last.name, last.ok) == ("model mini", False) and "smaller" in last.advice
