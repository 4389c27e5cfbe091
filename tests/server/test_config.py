"""The gateway's settings: command line, environment and checks."""

from pathlib import Path

import pytest

from server.config import Config
from tests.permissions import run, unusable_folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "keys add"),
        (["--host", "192.0.2.1"], "anyone could start"),
        (["--port", "70000"], "70000"),
        (["--port", "x"], "invalid int"),
        (["--engine-threads", "0"], "engine-threads"),
        (["--engine-threads", "99999"], "engine-threads 99999 must be between 1 and 1024"),
        (["--idle-timeout", "nan"], "idle-timeout"),
        (["--queue-limit", "-1"], "queue-limit"),
        (["--engine-timeout", "0"], "engine-timeout"),
        (["--engine-start-timeout", "inf"], "engine-start-timeout"),
        (["--drain-timeout", "-1"], "drain-timeout"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        Config.from_arguments(arguments, {})
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_settings() -> None:
    assert Config.from_arguments([], {}) == Config()
    given = Config.from_arguments(
        ["--port", "1", "--model", "wan", "--engine-threads", "2"], {"LIVEREEL_PORT": "9", "LIVEREEL_IDLE_TIMEOUT": "5"}
    )
    assert (given.port, given.model, given.engine_threads, given.idle_timeout_s) == (1, "wan", 2, 5.0)
    for loopback in ("localhost", "127.0.0.2", "::1"):
        assert Config(host=loopback).host == loopback


def test_what_follows_two_dashes_goes_to_the_engine() -> None:
    config = Config.from_arguments(["--model", "krea-14b", "--", "--weights", "/w", "--kv-cache", "int8"], {})
    assert config.model == "krea-14b"
    assert config.engine_arguments == ("--weights", "/w", "--kv-cache", "int8")
    assert Config.from_arguments(["--port", "0"], {}).engine_arguments == ()


def test_a_spare_unless_it_is_turned_off() -> None:
    assert Config.from_arguments([], {}).engine_spare == "on"
    assert Config.from_arguments(["--engine-spare", "off"], {}).engine_spare == "off"
    assert Config.from_arguments([], {"LIVEREEL_ENGINE_SPARE": "off"}).engine_spare == "off"


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


def test_proxies(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.from_arguments(["--root-path", "/live/two", "--trusted-proxies", "10.0.0.5, 2001:db8::/32"], {})
    assert (config.root_path, config.trusted_proxies) == ("/live/two", ("10.0.0.5", "2001:db8::/32"))
    by_environment = Config.from_arguments([], {"LIVEREEL_ROOT_PATH": "/a", "LIVEREEL_TRUSTED_PROXIES": "::1"})
    assert (by_environment.root_path, by_environment.trusted_proxies) == ("/a", ("::1",))
    assert Config.from_arguments([], {"LIVEREEL_ROOT_PATH": "", "LIVEREEL_TRUSTED_PROXIES": ""}).trusted_proxies == ()
    for path in ("live", "/live/", "/", "//a", "/a/../b", "/a b", "/a?b", "/%41"):
        with pytest.raises(SystemExit):
            Config.from_arguments(["--root-path", path], {})
        assert f"root-path {path} must be a path such as /live" in capsys.readouterr().err
    for proxy in ("proxy.example", "10.0.0.0/33", "*", "10.0.0.5:80"):
        with pytest.raises(SystemExit):
            Config.from_arguments(["--trusted-proxies", proxy], {})
        assert f"trusted-proxies {proxy} must be an IP address or network" in capsys.readouterr().err


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


TRY_OPTIONS = """
import sys
from server.config import Config
for given in sys.argv[1:]:
    try:
        Config.from_arguments(given.split("="), {})
        print(f"{given} is accepted", file=sys.stderr)
    except SystemExit:
        pass
"""


def test_paths_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    folders = unusable_folders(tmp_path)
    given = [(option, path, says) for path, says in folders.items() for option in ("data", "loras", "keys")]
    found = run("-c", TRY_OPTIONS, *(f"--{option}={path}" for option, path, _ in given))
    assert found.returncode == 0, found.stderr
    sentences = [line for line in found.stderr.splitlines() if "python -m server: error: " in line]
    assert len(sentences) == len(given) == len(folders) * 3, found.stderr
    for sentence, (option, path, says) in zip(sentences, given, strict=True):
        assert f"error: {option} {path} " in sentence
        assert option == "keys" or says in sentence
