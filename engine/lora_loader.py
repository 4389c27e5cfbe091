"""Reads LoRA files in a thread of its own, since that can take seconds; the worker applies them between chunks."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine import wire
from engine.checkpoints import lora
from engine.checkpoints.store import StoreError
from engine.models.dit import CausalWan
from engine.transforms.lora import Adapters


@dataclass(frozen=True)
class LoadedLoras:
    """The LoRAs and strengths that `request` asks for, or why they cannot be had."""

    request: wire.SetLoras
    loras: list[tuple[lora.Lora, float]] | StoreError


class LoraLoader:
    """The LoRA files in a folder, and which of them are applied to a model."""

    def __init__(self, wan: CausalWan, folder: Path | None, loaded: Callable[[LoadedLoras], None]) -> None:
        """`loaded` is called from the reading thread, once per `request`, in the order of the requests."""
        self.adapters = Adapters(wan)
        self._folder = folder
        self._loaded = loaded
        self._shapes = lora.shapes_of(wan)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loras")

    def names(self) -> list[str]:
        """The LoRAs in the folder."""
        return lora.names(self._folder) if self._folder is not None else []

    def request(self, message: wire.SetLoras, strengths: Mapping[str, float]) -> None:
        """Read the LoRAs named in `strengths`, without waiting for them."""
        self._reader.submit(self._read, message, strengths)

    def close(self) -> None:
        """Drop the requests that have not begun."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, request: wire.SetLoras, strengths: Mapping[str, float]) -> None:
        active = self.adapters.active
        found: list[tuple[lora.Lora, float]] | StoreError
        try:
            found = [(active[name][0] if name in active else self._load(name), s) for name, s in strengths.items()]
        except StoreError as error:
            found = error
        except Exception as error:  # out of memory, a file that vanishes: the client is told, whatever it is
            print(f"engine: LoRAs could not be read: {error!r}", flush=True)
            found = StoreError("the LoRAs could not be read: see the server's log")
        self._loaded(LoadedLoras(request, found))

    def _load(self, name: str) -> lora.Lora:
        if self._folder is None:
            raise lora.LoraNotFoundError(f"there is no LoRA {name!r}: start the server with `--loras DIR`")
        return lora.read(self._folder, name, self._shapes)
