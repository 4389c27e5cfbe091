"""The gateway's command line."""

import sys

import pytest

from server.backends.local import LocalBackend
from server.config import Config


def test_what_follows_two_dashes_goes_to_the_engine() -> None:
    config = Config.from_arguments(["--model", "krea-14b", "--", "--weights", "/w", "--kv-cache", "int8"], {})
    assert config.model == "krea-14b"
    assert config.engine_arguments == ("--weights", "/w", "--kv-cache", "int8")
    assert Config.from_arguments(["--port", "0"], {}).engine_arguments == ()


@pytest.mark.anyio
async def test_the_engine_gets_them(tmp_path, capfd) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "engine.py"
    script.write_text("import sys; print(sys.argv[1:], file=sys.stderr); sys.exit(2)")
    backend = LocalBackend("mini", command=(sys.executable, str(script)), threads=2, arguments=("--weights", "/w"))
    lost = []
    await backend.start(lambda event, pixels: lost.append(event))
    assert backend._supervisor is not None
    await backend._supervisor
    words = capfd.readouterr().err
    assert "'mini', '--socket'" in words
    assert words.rstrip().endswith("'--threads', '2', '--weights', '/w']")
    assert not backend.health().ready
