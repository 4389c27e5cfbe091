"""Reads the headers of GGUF files, without trusting them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is the magic, a version, the numbers of
tensors and of key-value pairs, the pairs, the tensors' names, shapes, types and offsets, and the tensors, each at a
multiple of `general.alignment`. All numbers are little endian. A shape's fastest dimension comes first, and llama.cpp
drops slowest dimensions of 1. This module does not load torch, so that checking weights is fast.
"""

import mmap
import os
from math import prod
from pathlib import Path
from struct import calcsize, error, unpack_from

from engine.checkpoints.headers import MAX_HEADER, ContentError, Entry, StoreError, open_regular, printable

MAGIC, VERSIONS = b"GGUF", (2, 3)
SUFFIX = ".gguf"
READ = ("F32", "F16", "BF16", "Q8_0")
"""Types of tensors that are read. Q8_0 is a float16 scale before each 32 int8 values, which it multiplies."""
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Number of a tensor's type -> its name, and a block's elements and bytes."""
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a value's type -> its struct format."""
STRING, ARRAY, UINT32, INT32 = 8, 9, 4, 5
ALIGNMENT = "general.alignment"
SHAPE = "comfy.gguf.orig_shape."
"""Prefix of keys that hold a tensor's shape, slowest dimension first, which ComfyUI-GGUF stored in another one."""
MAX_NAME, MAX_DIMS = 65535, 8
LEAST_PAIR, LEAST_TENSOR = 13, 24
"""Bytes that the smallest key-value pair and the smallest tensor take in the header."""


class _Header:
    """Takes values from the start of a mapped file, in order."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self.at = 0

    def fail(self, what: str) -> StoreError:
        return StoreError(f"{self._path} has a header that cannot be read: {what}: download it again")

    def number(self, form: str) -> int:
        try:
            found: int = unpack_from(f"<{form}", self._data, self.at)[0]
        except error:
            raise self.fail(f"it ends at byte {self.at}, within a value") from None
        self.at += calcsize(f"<{form}")
        return found

    def skip(self, size: int) -> None:
        if size > len(self._data) - self.at:
            raise self.fail(f"{size} bytes are said to follow byte {self.at}, and {len(self._data) - self.at} do")
        self.at += size

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_NAME:
            raise self.fail(f"a name at byte {self.at} is said to have {length} bytes")
        self.skip(length)
        try:
            return self._data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise self.fail(f"the name at byte {self.at - length} is not UTF-8") from None

    def count(self, of: str, least: int) -> int:
        """How many things follow that take at least `least` bytes each."""
        found = self.number("Q")
        if found * least > len(self._data) - self.at:
            raise self.fail(f"it says that {found} {of} follow, for which it has no room")
        return found

    def skip_value(self, kind: int) -> None:
        if kind in VALUES:
            self.skip(calcsize(VALUES[kind]))
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            self._skip_array()
        else:
            raise self.fail(f"a value at byte {self.at} is of type {kind}, which is not known")

    def _skip_array(self) -> None:
        kind = self.number("I")
        if kind in VALUES:
            size = calcsize(VALUES[kind])
            self.skip(self.count("values", size) * size)
        elif kind == STRING:  # hundreds of thousands in a tokenizer
            for _ in range(self.count("strings", 8)):
                self.skip(self.number("Q"))
        else:
            raise self.fail(f"an array at byte {self.at} is of type {kind}, which is not known")


def read_header(path: Path, folder: Path | None = None) -> dict[str, Entry]:
    """Every tensor of a GGUF file by name, its shape with the slowest dimension first, as torch has it.

    Nothing is allocated by what the header says: names and numbers of things are held against the file's length first.

    Raises:
        ContentError: a tensor is of a type that is not read, or lies outside the file; the error has the entries.
        StoreError: the file is missing, is not a valid GGUF file, or is not in `folder` (default: its own).
    """
    with open_regular(path, folder or path.parent) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != MAGIC or size < 24:
            raise StoreError(f"{path} is no GGUF file: download it again")
        with mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
            header = _Header(data, path)
            header.skip(4)
            version = header.number("I")
            if version & 0xFFFF == 0:
                raise StoreError(f"{path} is a big-endian GGUF file, which is not read: get the little-endian one")
            if version not in VERSIONS:
                raise StoreError(f"{path} is of GGUF version {version}, which is not read: get one of version 3")
            entries = _entries(header, path)
    _check_places(entries, size, path)
    return entries


def _entries(header: _Header, path: Path) -> dict[str, Entry]:
    tensors = header.count("tensors", LEAST_TENSOR)
    alignment, shapes = _pairs(header)
    listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = header.text()
        printable(name, path)
        if name in listed:
            raise header.fail(f"{name} is there twice")
        if (dims := header.number("I")) > MAX_DIMS:
            raise header.fail(f"{name} is said to have {dims} dimensions")
        shape = tuple(header.number("Q") for _ in range(dims))[::-1]
        listed[name] = shape, header.number("I"), header.number("Q")
    begin = -(-header.at // alignment) * alignment
    entries = {}
    for name, (shape, kind, offset) in listed.items():
        if kind not in TYPES:
            raise StoreError(f"{path}: {name} is of GGUF type {kind}, which is not known: get {_better()}")
        dtype, elements, block_bytes = TYPES[kind]
        if elements > 1 and (not shape or shape[-1] % elements):
            raise header.fail(f"{name} is {dtype} {list(shape)}, whose rows are not blocks of {elements}")
        if offset % alignment:
            raise header.fail(f"{name} is at byte {offset}, which is no multiple of {alignment}")
        if prod(shapes.get(name, shape)) != prod(shape):
            raise header.fail(f"{name} is {list(shape)}, and {list(shapes[name])} was made of it")
        taken = prod(shape) // elements * block_bytes
        if begin + offset + taken >= 1 << 62:
            raise header.fail(f"{name} is said to end at byte {begin + offset + taken}")
        entries[name] = Entry(path, name, dtype, shapes.get(name, shape), begin + offset, taken)
    return entries


def _pairs(header: _Header) -> tuple[int, dict[str, tuple[int, ...]]]:
    """(alignment, original shapes by tensor) of the key-value pairs."""
    alignment, shapes = 32, {}
    for _ in range(header.count("key-value pairs", LEAST_PAIR)):
        key, kind = header.text(), header.number("I")
        if key == ALIGNMENT and kind == UINT32:
            alignment = header.number("I")
            if alignment.bit_count() != 1:
                raise header.fail(f"{ALIGNMENT} is {alignment}, which is no power of two")
        elif key.startswith(SHAPE) and kind == ARRAY:
            if header.number("I") != INT32 or (dims := header.count("dimensions", 4)) > MAX_DIMS:
                raise header.fail(f"{key} is no shape")
            shape = tuple(header.number("i") for _ in range(dims))
            if min(shape, default=0) < 0:
                raise header.fail(f"{key} is {list(shape)}, which is no shape")
            shapes[key.removeprefix(SHAPE)] = shape
        else:
            header.skip_value(kind)
    return alignment, shapes


def _better() -> str:
    return "the weights in Q8_0, F16 or BF16, or as safetensors"


def _check_places(entries: dict[str, Entry], size: int, path: Path) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start < end:
            raise StoreError(
                f"{path}: {entry.name} at byte {entry.start} overlaps the tensor before it: download it again"
            )
        end = entry.start + entry.bytes
    if end > size:
        raise ContentError(f"{path} is truncated: {size} bytes, its header says {end}: download it again", entries)
    refused = [entry for entry in entries.values() if entry.dtype not in READ]
    if refused:
        more = f", as {len(refused) - 1} more are not either" if len(refused) > 1 else ""
        raise ContentError(
            f"{path}: {refused[0].name} is of type {refused[0].dtype}, which is not read{more}: get {_better()}",
            entries,
        )


def fit(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """`wanted`, if a tensor of that shape is stored in a GGUF file as `shape`; otherwise `shape`.

    llama.cpp drops slowest dimensions of 1, and has at most 4, so that the slowest of more are multiplied.
    """
    dropped = wanted[next((index for index, size in enumerate(wanted) if size != 1), 0) :]
    merged = (prod(wanted[:-3]), *wanted[-3:])
    return wanted if shape == dropped or (len(wanted) > 4 and shape == merged) else shape
