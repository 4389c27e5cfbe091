"""Files and folders that hold nothing usable are named with what they hold; `test_convert.py` has the others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import cli
from engine.checkpoints import sources
from engine.checkpoints.headers import StoreError


def test_an_unknown_network_is_named_by_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"unet.conv_in.weight": torch.ones(2, 2), "unet.x": torch.ones(1)}, path)
    with pytest.raises(StoreError, match="no network that is known here, but unet"):
        sources.find(path)
    with pytest.raises(StoreError, match=r"no weights that are known here, only .*model\.safetensors"):
        sources.find(tmp_path)


def test_a_file_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with pytest.raises(StoreError, match=r"model\.onnx is neither a folder nor"):
        sources.find(path)
    with pytest.raises(StoreError, match=r"holds no weights: no \.safetensors file"):
        sources.find(tmp_path)


def test_damage_of_a_pickle_is_seen_without_reading_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt"
    torch.save({"generator": {"a": torch.ones(4000)}}, path)
    assert sources.pickle_fault(path) is None
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert sources.pickle_fault(path) == f"{path} is truncated: download it again"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fault = sources.pickle_fault(path)
    assert fault is not None and "run `git lfs pull`" in fault
    # and `check` counts it as a fault
    assert cli.run(["check", "self-forcing-1.3b", "--weights", str(path)]) == 2
    assert f"\n{fault}\n" in capsys.readouterr().out


def test_a_tokenizer_may_come_from_another_place(tmp_path: Path) -> None:
    networks, other = tmp_path / "networks", tmp_path / "other"
    networks.mkdir()
    other.mkdir()
    save_file({"patch_embedding.weight": torch.ones(2, 2)}, networks / "dit.safetensors")
    (other / "tokenizer.json").write_text("{}")
    for place in (other, other / "tokenizer.json"):
        found = sources.find_all([networks, place])
        assert found.tokenizer == other / "tokenizer.json" and found.lacking() == ["text_encoder", "vae or light_vae"]


def test_a_tokenizer_that_was_not_downloaded_is_a_fault(tmp_path: Path) -> None:
    save_file({"patch_embedding.weight": torch.ones(2, 2)}, tmp_path / "dit.safetensors")
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    found = sources.find(tmp_path)
    assert found.faults == [
        f"{tmp_path / 'tokenizer.json'} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    ]
    assert "tokenizer.json" in found.lacking()


def test_shards_without_their_index_are_read_together(tmp_path: Path) -> None:
    for number in (1, 2):
        tensors = {f"blocks.{number}.cross_attn.q.weight": torch.ones(2, 2)}
        save_file(tensors, tmp_path / f"dit-{number:05}-of-00002.safetensors")
    for place in (tmp_path, tmp_path / "dit-00002-of-00002.safetensors"):
        found = sources.find(place)
        assert len(found.parts["dit"].entries) == 2 and not found.parts["dit"].faults and not found.faults
    (tmp_path / "dit-00001-of-00002.safetensors").unlink()
    faults = sources.find(tmp_path).parts["dit"].faults
    assert faults == [
        f"{tmp_path / 'dit-00002-of-00002.safetensors'} is one shard of 2, and 1 are missing: download them"
    ]


def test_a_decoder_of_raw_latents_is_refused(tmp_path: Path) -> None:
    for name, faults in (("taew2_1", 0), ("lighttaew2_1", 1)):
        save_file({"decoder.1.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
        found = sources.find(tmp_path / f"{name}.safetensors")
        assert len(found.faults) == faults and ("light_vae" in found.parts) == (not faults)
    assert "raw latents, which is not served: get TAEHV's taew2_1" in found.faults[0]
