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


def test_a_way_to_viewers_behind_nat(capsys: pytest.CaptureFixture[str]) -> None:
    servers = "stun:stun.example.org, turns:turn.example.org:5349?transport=tcp"
    arguments = ["--ice-servers", servers, "--public-address", "203.0.113.7", "--bitrate", "4000"]
    config = Config.from_arguments(arguments, {"LIVEREEL_TURN_SECRET": "hush"})
    assert config.ice_servers == ("stun:stun.example.org", "turns:turn.example.org:5349?transport=tcp")
    assert (config.public_address, config.turn_secret, config.bitrate_kbps) == ("203.0.113.7", "hush", 4000)
    assert "hush" not in repr(config)
    by_environment = Config.from_arguments([], {"LIVEREEL_ICE_SERVERS": "stun:a", "LIVEREEL_PUBLIC_ADDRESS": "::1"})
    assert (by_environment.ice_servers, by_environment.public_address) == (("stun:a",), "::1")
    for wrong, named in (
        (["--ice-servers", "turn:a"], "LIVEREEL_TURN_SECRET"),
        (["--ice-servers", "http://a"], "ice-servers http://a"),
        (["--ice-servers", 'stun:a>; rel="x"'], "ice-servers stun:a>"),
        (["--public-address", "example.org"], "public-address example.org"),
        (["--bitrate", "0"], "bitrate 0"),
    ):
        with pytest.raises(SystemExit):
            Config.from_arguments(wrong, {})
        assert named in capsys.readouterr().err
