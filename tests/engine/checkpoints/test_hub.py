"""Downloads by name, from a small hub of our own on loopback: cut connections, wrong hashes, no room, licences."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine import cli
from engine.checkpoints import hub, store, wan
from engine.checkpoints.headers import StoreError
from engine.config import PRESETS, HubSource
from engine.models.config import DiTConfig

ROOT = Path(__file__).parents[3]
COMMIT = "c0ffee" + 34 * "0"
TINY = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, in_channels=4, out_channels=4, freq_dim=32)
SOURCES = (
    HubSource("someone/student", ("models/student.safetensors",), "not stated"),
    HubSource("someone/base", ("vae.bin", "google/umt5-xxl/tokenizer.json"), "mit"),
)
PRESET = replace(PRESETS["self-forcing-1.3b"], name="tiny", dit=TINY, sources=SOURCES)


@dataclass
class Hub:
    """What the hub holds, and how it misbehaves."""

    files: dict[str, dict[str, bytes]]
    url: str = ""
    licence: str | None = None
    cut: list[int] = field(default_factory=list)
    """After how many bytes the next answers break off."""
    lie: bytes = b""
    """Sent in place of the first bytes of a file."""
    sizes: dict[str, int] = field(default_factory=dict)
    ranges: list[str | None] = field(default_factory=list)

    def info(self, repository: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.files[repository].items():
            entry: dict[str, Any] = {"rfilename": path, "size": self.sizes.get(path, len(data))}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if not path.endswith(".json"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        card = {"license": self.licence} if self.licence else {}
        return {"id": repository, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False}


def handler(state: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/(.+?)(/revision/\w+)?", path):
                known = found[1] in state.files
                body = json.dumps(state.info(found[1]) if known else {"error": "Repository not found"}).encode()
                self.send_response(200 if known else 404)
                if not known:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.finish_with(body, len(body), 0)
                return
            found = re.fullmatch(rf"/(\w+/\w+)/resolve/{COMMIT}/(.+)", path)
            assert found, path
            data = state.files[found[1]][found[2]]
            data = state.lie + data[len(state.lie) :]
            start = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            if self.command == "GET":
                state.ranges.append(self.headers.get("range"))
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            stop = state.cut.pop(0) if state.cut and self.command == "GET" else len(data)
            self.finish_with(data[start : start + stop], len(data) - start, 0)

        def finish_with(self, body: bytes, length: int, _: int) -> None:
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in wan.tensors(TINY).items()}, tmp_path / "student")
    student = (tmp_path / "student").read_bytes()
    (tmp_path / "student").unlink()
    state = Hub(
        {
            "someone/student": {"models/student.safetensors": student, "README.md": b"# Student"},
            "someone/base": {"vae.bin": bytes(range(256)) * 200, "google/umt5-xxl/tokenizer.json": b'{"model": {}}'},
        }
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
    template = f"{state.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # written, and kept, in such pieces
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_are_fetched_at_one_commit_and_checked(served: Hub, tmp_path: Path) -> None:
    listings = hub.look_up(PRESET)
    files = [file for listing in listings for file in listing.files]
    assert {file.commit for file in files} == {COMMIT}
    assert [file.path for file in files] == [path for source in SOURCES for path in source.files]
    assert [listing.licence for listing in listings] == ["not stated", "mit"]
    for file in files:
        path = hub.fetch(file, tmp_path)
        assert path == tmp_path / file.local
        assert path.read_bytes() == served.files[file.repository][file.path]
        assert hub.fetch(file, tmp_path) == path and hub.missing_bytes(file, tmp_path) == 0
    assert len(served.ranges) == 3  # what is there is not fetched again
    assert hub.places(listings[0], tmp_path) == [tmp_path / "student" / "models" / "student.safetensors"]
    assert hub.places(listings[1], tmp_path) == [tmp_path / "base"]


def test_the_repositorys_own_licence_has_the_last_word(served: Hub) -> None:
    served.licence = "cc-by-nc-4.0"
    assert {listing.licence for listing in hub.look_up(PRESET)} == {"cc-by-nc-4.0"}


def test_a_cut_connection_is_continued(served: Hub, tmp_path: Path) -> None:
    served.cut = [20_000, 20_000]
    [vae, _] = hub.look_up(PRESET)[1].files
    path = hub.fetch(vae, tmp_path)
    assert path.read_bytes() == served.files["someone/base"]["vae.bin"]
    assert served.ranges == [None, "bytes=20000-", "bytes=40000-"]
    assert list(path.parent.iterdir()) == [path]


def test_what_arrived_before_a_kill_is_used(served: Hub, tmp_path: Path) -> None:
    [vae, _] = hub.look_up(PRESET)[1].files
    part = tmp_path / "base" / "vae.bin.part"
    part.parent.mkdir()
    part.write_bytes(served.files["someone/base"]["vae.bin"][:30_000])
    assert hub.missing_bytes(vae, tmp_path) == vae.size - 30_000
    assert hub.is_intact(hub.fetch(vae, tmp_path), vae)
    assert served.ranges == ["bytes=30000-"]


def test_a_hub_that_always_breaks_off_is_given_up_and_what_came_is_kept(served: Hub, tmp_path: Path) -> None:
    served.cut = [10_000] + [0] * 30
    [vae, _] = hub.look_up(PRESET)[1].files
    with pytest.raises(StoreError, match="again to go on"):
        hub.fetch(vae, tmp_path)
    assert (tmp_path / "base" / "vae.bin.part").stat().st_size == 10_000
    served.cut = []
    assert hub.is_intact(hub.fetch(vae, tmp_path), vae)


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_hash_is_refused_and_nothing_stays(served: Hub, tmp_path: Path, number: int) -> None:
    """By SHA-256 for large files, by git's SHA-1 for small ones."""
    file = hub.look_up(PRESET)[1].files[number]
    served.lie = b"EVIL"
    with pytest.raises(StoreError, match="damaged"):
        hub.fetch(file, tmp_path)
    assert not list((tmp_path / file.local).parent.iterdir())


def test_another_file_in_its_place_is_not_overwritten(served: Hub, tmp_path: Path) -> None:
    file = hub.look_up(PRESET)[1].files[1]
    (path := tmp_path / file.local).parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(StoreError, match="delete it"):
        hub.fetch(file, tmp_path)
    assert path.read_bytes() == b"mine"


def test_what_the_hub_lacks_is_named(served: Hub) -> None:
    for source, what in (
        (HubSource("someone/base", ("gone.bin",), ""), "holds no gone.bin"),
        (HubSource("someone/nobody", ("x",), ""), "someone/nobody"),
    ):
        with pytest.raises(StoreError, match=what):
            hub.look_up(replace(PRESET, sources=(source,)))


def test_presets_without_published_files() -> None:
    with pytest.raises(StoreError, match="part of Livereel"):
        hub.look_up(PRESETS["mini"])
    with pytest.raises(StoreError, match="framewise-2step"):
        hub.look_up(replace(PRESETS["causal-forcing-1.3b-2step"], sources=()))


def test_download_converts_into_the_store_that_the_engine_finds(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIVEREEL_WEIGHTS", str(tmp_path / "weights"))
    to = hub.default_folder("tiny")
    preset = replace(PRESET, sources=SOURCES[:1])
    assert cli.download(preset, to) == 0
    assert "patch_embedding.weight" in "".join(store.load(to))
    assert "licence: not stated" in capsys.readouterr().out
    assert [path.name for path in to.parent.iterdir()] == ["tiny"]
    with pytest.raises(StoreError, match="not empty"):
        cli.download(preset, to)
    assert cli.download(preset, tmp_path / "other", keep=True) == 0
    assert (tmp_path / "other.downloads" / "student" / "models" / "student.safetensors").exists()


def test_a_disk_without_room_is_told_before_the_download(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engine.checkpoints.hub.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"GB free.*--to"):
        cli.download(PRESET, tmp_path / "store")
    assert served.ranges == [] and not list(tmp_path.iterdir())


def test_the_command_asks_the_hub_of_the_environment(served: Hub, tmp_path: Path) -> None:
    """With the files of a real preset, which are too large for any disk here. `HF_HUB_OFFLINE` is for servers."""
    served.licence = "apache-2.0"
    for source in PRESETS["longlive-1.3b"].sources:
        served.files[source.repository] = dict.fromkeys((*source.files, *source.loras), b"x")
        served.sizes |= dict.fromkeys((*source.files, *source.loras), 10**15)
    done = subprocess.run(
        [sys.executable, "-m", "engine", "download", "longlive-1.3b", "--to", str(tmp_path / "store")],
        cwd=ROOT, env={**os.environ, "HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "GB are needed" in done.stderr, done.stderr
    assert "Efficient-Large-Model/LongLive-1.3B (licence: apache-2.0)" in done.stdout
    assert "models/lora.pt" in done.stdout and "Wan2.1_VAE.pth" in done.stdout


def test_sources_name_what_conversion_needs() -> None:
    for preset in PRESETS.values():
        repositories = [source.repository for source in preset.sources]
        assert len(repositories) == len(set(repositories)) and all(source.licence for source in preset.sources)
        if preset.sources:
            files = [path for source in preset.sources for path in source.files]
            assert sum("umt5-xxl-enc" in path for path in files) == sum("VAE" in path for path in files) == 1
