"""Our reader against the `gguf` package's writer and reader, and against damaged and hostile headers."""

import os
import struct
import tracemalloc
from pathlib import Path
from random import Random

import gguf as reference
import numpy as np
import pytest

from engine.checkpoints import gguf, headers, sources
from engine.checkpoints.convert import open_tensors
from engine.checkpoints.headers import ContentError, StoreError

Types = reference.GGMLQuantizationType
ARRAYS = {
    "patch_embedding.weight": np.arange(64, dtype=np.float32).reshape(4, 4, 1, 2, 2),
    "blocks.0.modulation": np.arange(192, dtype=np.float32).reshape(1, 6, 32),
    "blocks.0.ffn.0.weight": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32),
    "blocks.0.ffn.0.bias": np.linspace(-1, 1, 3, dtype=np.float32),
}


def write(path: Path, types: dict[str, Types], alignment: int | None = None, **shapes: tuple[int, ...]) -> Path:
    """A file as ComfyUI-GGUF's converter writes it: other tensors than those of `types` are float32."""
    writer = reference.GGUFWriter(path, "wan")
    writer.add_string("general.name", "x" * 70_000)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "\u00e4"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("general.flag", True)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, array in ARRAYS.items():
        kind = types.get(name, Types.F32)
        data = array.astype(np.float16) if kind == Types.F16 else reference.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw(*tensors: tuple[str, tuple[int, ...], int, int], pairs: bytes = b"", count: int = 0, data: int = 0) -> bytes:
    """A file by hand, its shapes as GGUF has them: (name, shape, type, offset)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs
    for name, shape, kind, offset in tensors:
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    return head + bytes(-len(head) % 32) + b"?" * data


def fault(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(StoreError) as error:
        gguf.read_header(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("alignment", [None, 8, 4096])
@pytest.mark.parametrize("kind", [Types.F32, Types.F16, Types.BF16, Types.Q8_0])
def test_tensors_are_those_of_the_reference(tmp_path: Path, kind: Types, alignment: int | None) -> None:
    path = write(tmp_path / "x.gguf", {"blocks.0.ffn.0.weight": kind}, alignment)
    theirs = {tensor.name: tensor for tensor in reference.GGUFReader(path).tensors}
    entries = gguf.read_header(path)
    assert list(entries) == list(ARRAYS)
    weights = headers.read_weights([path], tmp_path, gguf.read_header)
    for name, tensor in open_tensors(weights).items():
        assert tensor.shape == ARRAYS[name].shape == tuple(reversed(theirs[name].shape.tolist()))
        assert (entries[name].start, entries[name].bytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        expected = reference.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        found = tensor.read()
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert np.array_equal(found.float().numpy(), expected.reshape(tensor.shape))


def test_types_are_those_of_the_reference() -> None:
    expected = {int(kind): (kind.name, *reference.GGML_QUANT_SIZES[kind]) for kind in Types}
    assert gguf.TYPES.items() <= expected.items()
    assert set(gguf.READ) <= {name for name, _, _ in gguf.TYPES.values()}


def test_shapes_that_the_format_cannot_keep(tmp_path: Path) -> None:
    """ComfyUI-GGUF notes a changed shape; llama.cpp drops slowest dimensions of 1, and merges more than four."""
    path = write(tmp_path / "x.gguf", {}, **{"blocks.0.ffn.0.weight": (1, 3, 8, 8)})
    assert gguf.read_header(path)["blocks.0.ffn.0.weight"].shape == (1, 3, 8, 8)
    with pytest.raises(StoreError, match=r"is \[3, 64\], and \[7\] was made of it"):
        gguf.read_header(write(tmp_path / "y.gguf", {}, **{"blocks.0.ffn.0.weight": (7,)}))
    for stored, wanted in (((6, 32), (1, 6, 32)), ((32,), (1, 1, 32)), ((64, 1, 2, 2), (4, 16, 1, 2, 2))):
        assert gguf.fit(stored, wanted) == wanted
    for stored, wanted in (((6, 32), (2, 6, 32)), ((32, 6), (1, 6, 32)), ((8,), (2, 4)), ((64, 2, 2), (4, 16, 2, 2))):
        assert gguf.fit(stored, wanted) == stored


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    text = fault(path, raw(("a", (256, 2), 12, 0), ("b", (32,), 2, 288), data=320))
    assert text == (
        f"{path}: a is of type Q4_K, which is not read, as 1 more are not either: get the weights in Q8_0, F16 or "
        "BF16, or as safetensors"
    )
    with pytest.raises(ContentError) as error:
        gguf.read_header(path)
    assert error.value.entries["a"].bytes == 288
    assert "b is of GGUF type 5, which is not known: get the weights" in fault(path, raw(("b", (32,), 5, 0), data=64))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HUGE = 1 << 40
DAMAGED = {
    "magic": (b"GGML" + raw()[4:], "is no GGUF file"),
    "empty": (b"", "is no GGUF file"),
    "short": (b"GGUF\3\0\0\0", "is no GGUF file"),
    "big endian": (
        b"GGUF\0\0\0\3" + bytes(40),
        "is a big-endian GGUF file, which is not read: get the little-endian one",
    ),
    "version": (b"GGUF\1\0\0\0" + bytes(40), "is of GGUF version 1, which is not read: get one of version 3"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"it says that {HUGE} tensors follow, for which it has no"),
    "pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"it says that {HUGE} key-value pairs follow"),
    "key": (raw(pairs=struct.pack("<Q", HUGE), count=1), "it says that 1 key-value pairs follow"),
    "long key": (
        raw(pairs=struct.pack("<Q", HUGE), count=1, data=64),
        f"a name at byte 32 is said to have {HUGE} bytes",
    ),
    "string": (
        raw(pairs=string("k") + struct.pack("<IQ", 8, HUGE), count=1, data=9),
        f"{HUGE} bytes are said to follow",
    ),
    "array": (
        raw(pairs=string("k") + struct.pack("<IIQ", 9, 4, HUGE), count=1, data=9),
        f"it says that {HUGE} values follow",
    ),
    "strings": (
        raw(pairs=string("k") + struct.pack("<IIQ", 9, 8, HUGE), count=1, data=9),
        f"it says that {HUGE} strings follow",
    ),
    "value": (raw(pairs=string("k") + struct.pack("<I", 13), count=1, data=9), "is of type 13, which is not known"),
    "nested": (
        raw(pairs=string("k") + struct.pack("<IIQ", 9, 9, 1), count=1, data=9),
        "is of type 9, which is not known",
    ),
    "alignment": (
        raw(pairs=string("general.alignment") + struct.pack("<II", 4, 0), count=1),
        "general.alignment is 0, which is no power of two",
    ),
    "odd alignment": (
        raw(pairs=string("general.alignment") + struct.pack("<II", 4, 24), count=1),
        "general.alignment is 24, which is no power of two",
    ),
    "shape": (
        raw(pairs=string("comfy.gguf.orig_shape.a") + struct.pack("<IIQii", 9, 5, 2, -4, -8), count=1),
        "is [-4, -8], which is no shape",
    ),
    "dimensions": (raw(("a", (1,) * 9, 0, 0), data=64), "a is said to have 9 dimensions"),
    "size": (raw(("a", (HUGE, HUGE), 0, 0), data=64), "a is said to end at byte"),
    "truncated": (raw(("a", (HUGE,), 0, 0), data=64), "is truncated: 128 bytes, its header says"),
    "offset": (raw(("a", (4,), 0, HUGE), data=64), "is truncated"),
    "far offset": (raw(("a", (4,), 0, (1 << 64) - 32), data=64), "a is said to end at byte"),
    "no multiple": (raw(("a", (4,), 0, 8), data=64), "a is at byte 8, which is no multiple of 32"),
    "overlap": (raw(("a", (16,), 0, 0), ("b", (4,), 0, 32), data=64), "b at byte 128 overlaps the tensor before it"),
    "twice": (raw(("a", (4,), 0, 0), ("a", (4,), 0, 32), data=64), "a is there twice"),
    "blocks": (raw(("a", (33, 2), 8, 0), data=96), "a is Q8_0 [2, 33], whose rows are not blocks of 32"),
    "name": (raw(("a\x1b", (4,), 0, 0), data=64), "which cannot be printed"),
    "cut": (raw(("a", (4,), 0, 0))[:50], "has a header that cannot be read: it ends at byte"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named_without_allocating(tmp_path: Path, what: str) -> None:
    content, expected = DAMAGED[what]
    tracemalloc.start()
    text = fault(tmp_path / "x.gguf", content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in text
    assert peak < 1 << 20


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    content = raw(("ab", (4,), 0, 0), data=64).replace(b"ab", b"\xff\xfe")
    assert "is not UTF-8" in fault(tmp_path / "x.gguf", content)


def test_any_damage_is_a_store_error(tmp_path: Path) -> None:
    """Sound files with a few bytes changed: they are read, or refused in words."""
    random = Random(0)
    path = tmp_path / "x.gguf"
    pairs = (
        string("general.alignment")
        + struct.pack("<II", 4, 32)
        + string("k")
        + struct.pack("<IIQ", 9, 8, 1)
        + string("v")
    )
    sound = raw(("a", (32, 2), 8, 0), ("b", (4,), 0, 96), pairs=pairs, count=2, data=128)
    path.write_bytes(sound)
    assert list(gguf.read_header(path)) == ["a", "b"]
    refused = 0
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data) - 128)] = random.choice(b"\x00\x01\x08\x09\x20\x7f\xff")
        path.write_bytes(data[: random.choice((len(data), random.randrange(len(data))))])
        try:
            gguf.read_header(path)
        except StoreError:
            refused += 1
    assert refused > 200


def test_of_several_types_in_a_folder_the_one_that_is_read_is_taken(tmp_path: Path) -> None:
    name = "blocks.0.cross_attn.q.weight"
    (tmp_path / "a-Q4_K_M.gguf").write_bytes(raw((name, (256, 2), 12, 0), data=288))
    found = sources.find(tmp_path)
    assert "is of type Q4_K, which is not read: get" in found.parts["dit"].faults[0]
    (tmp_path / "a-Q8_0.gguf").write_bytes(raw((name, (32, 2), 8, 0), data=96))
    found = sources.find(tmp_path)
    assert not found.faults and not found.parts["dit"].faults
    assert found.unused == [tmp_path / "a-Q4_K_M.gguf"]
    (tmp_path / "b-F32.gguf").write_bytes(raw((name, (32, 2), 0, 0), data=256))
    assert "both hold a dit" in sources.find(tmp_path).faults[0]


def test_parts_of_a_file_are_read_together(tmp_path: Path) -> None:
    """As llama.cpp's `gguf-split` names them."""
    for part, name in enumerate(("blocks.0.cross_attn.q.weight", "blocks.0.cross_attn.k.weight"), 1):
        (tmp_path / f"x-{part:05}-of-00002.gguf").write_bytes(raw((name, (32, 2), 0, 0), data=256))
    assert len(sources.find(tmp_path).parts["dit"].entries) == 2
    (tmp_path / "x-00001-of-00002.gguf").unlink()
    assert "is one shard of 2, and 1 are missing" in sources.find(tmp_path).parts["dit"].faults[0]


def test_zeros_and_stand_ins(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(("blocks.0.cross_attn.q.weight", (32, 2), 8, 0)) + bytes(96))
    assert "holds zeros instead of weights" in sources.find(path).parts["dit"].faults[0]
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "run `git lfs pull`" in sources.find(path).faults[0]
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in sources.find(path).faults[0]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {})
    tensors = open_tensors(headers.read_weights([path], tmp_path, gguf.read_header))
    os.truncate(path, 100)
    with pytest.raises(StoreError, match=r"x\.gguf changed while it was read"):
        tensors["blocks.0.ffn.0.weight"].read()
