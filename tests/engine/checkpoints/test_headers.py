import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints import headers
from engine.checkpoints.headers import StoreError


def write(path: Path, header: Any, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 4),
        "f8": torch.zeros(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = headers.read_header(tmp_path / "x.safetensors")
    assert {name: value.shape for name, value in found.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    assert {found["a"].dtype, found["b"].dtype, found["f8"].dtype} == {"F32", "BF16", "F8_E4M3"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b at byte 4 overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "b at byte 12 leaves a gap"),
        ({"a": entry(4, 8)}, 8, "leaves a gap"),
        ({"a": entry(0, 8, [3])}, 8, r"a has 8 bytes, but F32 \[3\] takes 12"),
        ({"a": entry(0, 8)}, 7, "truncated"),
        ({"a": entry(0, 8)}, 9, "too long"),
        ({"a": entry(0, 8, dtype="F99")}, 8, "'F99', which is not known"),
        ({"a": entry(0, -8, [-2])}, 8, "malformed"),
        ({"a": entry(0, 8, [2.0])}, 8, "malformed"),
        ({"a": entry(0, 8, [True, 2])}, 8, "malformed"),
        ({"a": entry(8, 0, [2])}, 8, "malformed|has -8 bytes"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "malformed"),
        ({"a": [1, 2]}, 0, "malformed"),
        ({"\x1b[2J": entry(0, 8)}, 8, "cannot be printed"),
        ({"\ud800": entry(0, 8)}, 8, "cannot be printed"),
        ([1], 0, "no JSON object"),
        (b"{" * 100_000, 0, "unreadable header"),
        (b"[" * 100_000, 0, "unreadable header"),
        (b"\xff\xfe{}", 0, "unreadable header"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "appears twice"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(StoreError, match=message) as error:
        headers.read_header(path)
    assert str(path) in str(error.value)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length, message in ((1 << 63, "says that its header has"), (headers.MAX_HEADER + 1, "more than the")):
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, headers.MAX_HEADER + 1000)
        with pytest.raises(StoreError, match=message):
            headers.read_header(path)


def test_short_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"abc", bytes(8)):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(StoreError, match="no safetensors file"):
            headers.read_header(tmp_path / "x.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 15518464\n"
"""As Git LFS's specification has it."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "is a web page"),
        (bytes(4096), "begins with zeros"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    (tmp_path / "x.safetensors.index.json").write_bytes(content)
    for read in (headers.read_header, lambda path: headers.read_index(Path(f"{path}.index.json")).sound()):
        with pytest.raises(StoreError, match=message) as error:
            read(tmp_path / "x.safetensors")
        assert str(tmp_path / "x.safetensors") in str(error.value)


def matrices(path: Path, count: int, zero: set[int]) -> Path:
    tensors = {f"{i:02}": torch.full((40, 40), float(i not in zero)) for i in range(count)}
    save_file(tensors | {"bias": torch.zeros(9)}, path)
    return path


@pytest.mark.parametrize(
    ("count", "zero", "named"),
    [
        (40, set(range(40)), True),
        (40, set(range(30, 40)), True),  # a download that stopped
        (40, {7, 8}, False),  # by design
        (2, {0, 1}, True),
        (2, {0}, False),
        (0, set(), False),
    ],
)
def test_zeros_under_a_sound_header_are_named(tmp_path: Path, count: int, zero: set[int], named: bool) -> None:
    path = matrices(tmp_path / "x.safetensors", count, zero)
    faults = headers.read_weights([path], tmp_path).faults
    assert [f"{path} holds zeros instead of weights" in fault for fault in faults] == [True] * named


def test_a_truncated_file_is_not_said_to_hold_zeros_too(tmp_path: Path) -> None:
    path = matrices(tmp_path / "x.safetensors", 40, set())
    os.truncate(path, path.stat().st_size // 2)
    [fault] = headers.read_weights([path], tmp_path).faults
    assert f"{path} is truncated" in fault


def test_links_and_special_files(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    outside = write(tmp_path / "secret.safetensors", {"a": entry(0, 8)}, 8)
    (folder / "out.safetensors").symlink_to(outside)
    with pytest.raises(StoreError, match="a link out of its folder"):
        headers.read_header(folder / "out.safetensors")
    write(folder / "real.safetensors", {"a": entry(0, 8)}, 8)
    (folder / "in.safetensors").symlink_to("real.safetensors")
    assert list(headers.read_header(folder / "in.safetensors")) == ["a"]
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(StoreError, match="loop"):
        headers.read_header(folder / "loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(StoreError, match="not a regular file"):
        headers.read_header(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    with pytest.raises(StoreError, match=r"not a regular file|cannot be opened"):
        headers.read_header(folder / "folder.safetensors")
    with pytest.raises(StoreError, match="is missing"):
        headers.read_header(folder / "none.safetensors")


def index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"a": entry(0, 8)}, 8)
    write(tmp_path / "2.safetensors", {"b": entry(0, 8)}, 8)
    found = headers.read_index(index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert not found.faults
    assert set(found.entries) == {"a", "b"}
    assert found.bytes == 16

    found = headers.read_index(index(tmp_path, {"a": "2.safetensors", "b": "2.safetensors", "c": "3.safetensors"}))
    assert any("3.safetensors is missing" in fault for fault in found.faults)
    found = headers.read_index(index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors"}))
    assert any("the index says" in fault for fault in found.faults)
    found = headers.read_index(index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}))
    assert "c is not in 2.safetensors" in found.faults[0]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "\x1b.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.pt"]
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: str) -> None:
    assert "plain file name" in headers.read_index(index(tmp_path, {"a": name})).faults[0]


def test_a_malformed_index_is_named(tmp_path: Path) -> None:
    for content in ([1], {"a": 3}, None):
        assert "weight_map" in headers.read_index(index(tmp_path, content)).faults[0]
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{")
    assert "unreadable" in headers.read_index(path).faults[0]


def test_any_damage_is_a_store_error(tmp_path: Path) -> None:
    """Sound files with a few bytes changed: they are read, or refused in words."""
    random = Random(0)
    path = tmp_path / "x.safetensors"
    sound = write(path, {"a": entry(0, 8), "b": entry(8, 24, [2, 2]), "__metadata__": {"x": "y"}}, 24).read_bytes()
    refused = 0
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.choice(b'\x00"{}[],:019e\xff')
        path.write_bytes(data[: random.choice((len(data), random.randrange(len(data))))])
        try:
            headers.read_header(path)
        except StoreError:
            refused += 1
    assert refused > 1000
