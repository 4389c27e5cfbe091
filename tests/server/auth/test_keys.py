"""The key file, and the command that manages it."""

import errno
import os
from pathlib import Path

import pytest

from server.auth import keys
from server.config import Config
from tests.server.library.disk import full_at


def test_the_file_holds_no_key_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "studio", "studio", ["view"], 4, 120)
    assert key not in path.read_text() and keys.digest(key) in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    [entry] = keys.read_keys(path)
    assert (entry.name, entry.scopes, entry.streams) == ("studio", {"view"}, 4)
    with pytest.raises(ValueError, match="named studio already"):
        keys.add_key(path, "studio", "studio", ["view"], 4, 120)


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o666])
def test_a_file_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.toml"
    keys.add_key(path, "studio", "studio", ["view"], 4, 120)
    path.chmod(mode)
    with pytest.raises(ValueError, match="chmod 600"):
        Config(keys=path)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ('name = "a b"', "name"),
        ('name = "a"\nsha256 = "12"', "sha256"),
        (f'name = "a"\nsha256 = "{"0" * 64}"\nscopes = ["all"]', "scopes"),
        (f'name = "a"\nsha256 = "{"0" * 64}"\nstreams = 0', "streams"),
        (f'name = "a"\nsha256 = "{"0" * 64}"\nrequests_per_minute = true', "requests_per_minute"),
        (f'name = "a"\nsha256 = "{"0" * 64}"\npriority = 101', "priority"),
        (f'name = "a"\nsha256 = "{"0" * 64}"\nextra = 1', "extra"),
    ],
)
def test_faults_in_the_file_name_the_field(tmp_path: Path, table: str, field: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f"[[key]]\n{table}\n")
    path.chmod(0o600)
    with pytest.raises(ValueError, match=field):
        keys.read_keys(path)


def test_the_command_prints_a_key_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert keys.main(["add", "studio", "--keys", str(path), "--scope", "view", "--scope", "metrics"], {}) == 0
    key = capsys.readouterr().out.strip()
    found = keys.Keys(path).find(key)
    assert found is not None and found.scopes == {"view", "metrics"}
    with pytest.raises(SystemExit):
        keys.main(["add", "a/b", "--keys", str(path)], {})
    assert "name" in capsys.readouterr().err


def test_keys_are_listed_and_removed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    shown = {name: keys.add_key(path, name, "studio", ["view"], 4, 120, 7) for name in ("one", "two", "three")}
    path.write_text(path.read_text().replace("[[key]]", "# by hand\n[[ key ]]", 1))
    assert keys.main(["list", "--keys", str(path)], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["name", "owner", "scopes", "streams", "requests/min", "priority"],
        *([name, "studio", "view", "4", "120", "7"] for name in shown),
    ]
    for name in ("two", "three", "one"):
        assert keys.main(["remove", name], {"LIVEREEL_KEYS": str(path)}) == 0
        assert name not in [key.name for key in keys.read_keys(path)]
        assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "# by hand\n"
    with pytest.raises(SystemExit):
        keys.main(["remove", "two", "--keys", str(path)], {})
    assert "no key named two" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["keys.toml"]


def test_a_file_that_cannot_be_cut_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'key = [{{name = "a", sha256 = "{"0" * 64}"}}, {{name = "b", sha256 = "{"1" * 64}"}}]\n')
    path.chmod(0o600)
    before = path.read_text()
    with pytest.raises(ValueError, match="by hand"):
        keys.remove_key(path, "a")
    assert path.read_text() == before


def test_a_disk_that_is_full_or_read_only_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with full_at(10), pytest.raises(ValueError, match="cannot be written: File too large"):
        keys.write(tmp_path / "keys.toml", 100 * "x")


@pytest.mark.parametrize("kind", ["a long name", "a loop", "a folder", "a pipe"])
@pytest.mark.parametrize("command", ["add name", "list", "remove name"])
def test_paths_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    path = tmp_path / ("n" * 300 if kind == "a long name" else "keys.toml")
    if kind == "a loop":
        path.symlink_to(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(SystemExit):
        keys.main([*command.split(), "--keys", str(path)], {})
    assert f"python -m server keys: error: keys {path} " in capsys.readouterr().err
