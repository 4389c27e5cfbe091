import json
import os
from pathlib import Path

import pytest
import torch

from engine.checkpoints import store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    parts = {
        "dit": {"a.weight": torch.randn(8, 16), "a.bias": torch.randn(8), "conv.weight": torch.randn(4, 3, 1, 2, 2)},
        "light_vae": {"c.weight": torch.randn(4, 4, 3, 3)},
    }
    store.save(tmp_path / "w", parts, low_bit={"dit"}, extra={"tokenizer.json": "{}"})
    return tmp_path / "w"


def test_low_bit_round_trip(folder: Path) -> None:
    torch.manual_seed(0)
    weight, bias, conv = torch.randn(8, 16), torch.randn(8), torch.randn(4, 3, 1, 2, 2)
    tensors = store.load(folder)
    assert set(tensors) == {"dit.a.weight", "dit.a.bias", "dit.conv.weight", "light_vae.c.weight"}
    assert torch.equal(tensors["dit.a.bias"], bias)
    for name, value in (("dit.a.weight", weight), ("dit.conv.weight", conv)):
        step = value.abs().flatten(1).amax(dim=1).reshape(-1, *[1] * (value.ndim - 1)) / 127
        assert ((tensors[name] - value).abs() <= step / 2 + 1e-6).all()
    assert tensors["light_vae.c.weight"].dtype == torch.bfloat16


def test_missing_truncated_and_altered_files_are_all_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    light = folder / "light_vae.safetensors"
    light.write_bytes(light.read_bytes()[:-1])
    dit = folder / "dit.safetensors"
    data = bytearray(dit.read_bytes())
    data[-1] ^= 1
    dit.write_bytes(data)
    with pytest.raises(store.StoreError) as error:
        store.load(folder)
    text = str(error.value)
    assert "tokenizer.json is missing" in text
    assert "light_vae.safetensors is truncated" in text
    assert "dit.safetensors is altered" in text


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match=r"manifest\.json is missing"):
        store.verify(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(store.StoreError, match="not a manifest"):
        store.verify(tmp_path)


def test_a_manifest_cannot_point_outside(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(store.StoreError, match="plain file"):
        store.verify(folder)


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    light = folder / "light_vae.safetensors"
    target.write_bytes(light.read_bytes())
    light.unlink()
    light.symlink_to(target)
    with pytest.raises(store.StoreError, match="plain file"):
        store.verify(folder)


@pytest.mark.parametrize(
    "files", [{"a": {"bytes": 1}}, {"a": {"sha256": ""}}, {"a": 3}, {"a": {"bytes": [], "sha256": ""}}]
)
def test_a_manifest_with_faulty_entries_is_named(tmp_path: Path, files: object) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(store.StoreError, match="not a manifest"):
        store.open_store(tmp_path)


def test_a_component_reads_and_verifies_its_own_files(folder: Path) -> None:
    weights = store.open_store(folder)
    assert weights.components() == ["dit", "light_vae"] and weights.texts() == ["tokenizer.json"]
    assert weights.shapes("dit") == {"a.weight": (8, 16), "a.bias": (8,), "conv.weight": (4, 3, 1, 2, 2)}
    whole = store.load(folder)
    overwrite(folder / "dit.safetensors", -1)
    overwrite(folder / "tokenizer.json", 0)
    assert torch.equal(weights.read("light_vae")["c.weight"], whole["light_vae.c.weight"])
    for read in (lambda: weights.read("dit"), lambda: weights.read_text("tokenizer.json")):
        with pytest.raises(store.StoreError, match=r"dit\.safetensors is altered.*tokenizer\.json is altered"):
            read()


def overwrite(path: Path, position: int) -> None:
    """Change one byte, in place."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("position", [0, 9, 40, -1])
def test_what_changes_between_opening_and_reading_is_refused(folder: Path, position: int) -> None:
    """In the header's length, in the header, and in the data."""
    weights = store.open_store(folder)
    overwrite(folder / "light_vae.safetensors", position)
    with pytest.raises(store.StoreError, match=r"light_vae\.safetensors"):
        weights.read("light_vae")


def test_what_was_read_lies_in_memory_of_its_own(folder: Path) -> None:
    read = store.load(folder)
    before = {name: value.clone() for name, value in read.items()}
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(read[name], value) for name, value in before.items())
    for path in folder.iterdir():
        os.truncate(path, 0)  # a mapped page that is gone would end the process
    assert all(torch.equal(read[name], value) for name, value in before.items())


def test_every_kind_of_tensor_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Empty ones and scalars among them, and ones of more than a block that do not end with it."""
    torch.manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            torch.int64,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "long": torch.randn(store.BLOCK // 4 * 2 + 3)}
    writer = store.Writer(tmp_path)
    writer.add("x", {name: store.StoredTensor.of(value) for name, value in tensors.items()}, shard_bytes=1 << 20)
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    read = store.open_store(tmp_path).read("x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A file whose data takes a minute to hash."""
    header = json.dumps({"dit.a": {"dtype": "BF16", "shape": [1 << 35], "data_offsets": [0, 1 << 36]}}).encode()
    path = tmp_path / "dit.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 36))
    entry = {"bytes": path.stat().st_size, "sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {path.name: entry}}))
    assert store.open_store(tmp_path).shapes("dit") == {"a": (1 << 35,)}
