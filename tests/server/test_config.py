"""The gateway's command line."""

import sys
from pathlib import Path

import pytest

from server.backends.local import LocalBackend
from server.config import Config
from server.library.store import Store


def test_what_follows_two_dashes_goes_to_the_engine() -> None:
    config = Config.from_arguments(["--model", "krea-14b", "--", "--weights", "/w", "--kv-cache", "int8"], {})
    assert config.model == "krea-14b"
    assert config.engine_arguments == ("--weights", "/w", "--kv-cache", "int8")
    assert Config.from_arguments(["--port", "0"], {}).engine_arguments == ()


def test_a_spare_unless_it_is_turned_off() -> None:
    assert Config.from_arguments([], {}).engine_spare == "on"
    assert Config.from_arguments(["--engine-spare", "off"], {}).engine_spare == "off"
    assert Config.from_arguments([], {"LIVEREEL_ENGINE_SPARE": "off"}).engine_spare == "off"


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


def test_a_folder_for_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "data", tmp_path / "file"
    file.touch()
    arguments = ["--data", str(folder), "--data-limit", "2.5", "--keep", "0.5"]
    config = Config.from_arguments(arguments, {})
    assert (config.data, config.data_limit_gb, config.keep_hours) == (folder, 2.5, 0.5)
    assert Config.from_arguments([], {}).data is None
    folder.mkdir(mode=0o755)
    for wrong, named in (
        (["--data", str(folder)], f"chmod 700 {folder}"),
        (["--data", str(file)], "is not a folder"),
        (["--data-limit", "0"], "data-limit 0.0"),
        (["--keep", "nan"], "keep nan"),
    ):
        with pytest.raises(SystemExit):
            Config.from_arguments(wrong, {})
        assert named in capsys.readouterr().err


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "data", 1, 1.0), Store(tmp_path / "data", 1, 1.0)
    store.open()
    with pytest.raises(OSError, match="in use by another server"):
        other.open()
    store.close()
    other.open()
    other.close()


def test_a_folder_that_nobody_named_goes_with_the_server() -> None:
    store = Store(None, 1000, 1.0)
    store.open()
    path = store.create("x", ".mp4")
    store.save("x", ".bin", bytes(1000))
    store.measure()
    assert store.full and path.exists()
    store.close()
    assert not path.parent.exists()
