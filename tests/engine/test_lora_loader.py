"""LoRA files read in a thread of their own; `test_worker.py` applies them."""

import queue
from pathlib import Path

from engine import wire
from engine.checkpoints.lora import LoraNotFoundError
from engine.lora_loader import LoadedLoras, LoraLoader
from engine.pipeline import Pipeline


def test_requests_are_answered_in_order(pipeline: Pipeline, tmp_path: Path) -> None:
    answers: queue.SimpleQueue[LoadedLoras] = queue.SimpleQueue()
    loader = LoraLoader(pipeline.served.wan, tmp_path, answers.put)
    assert loader.names() == []
    missing, none = wire.SetLoras(1, {"nowhere": 1.0}), wire.SetLoras(2, {})
    loader.request(missing, {"nowhere": 1.0})
    loader.request(none, {})
    first, second = answers.get(timeout=20), answers.get(timeout=20)
    assert first.request == missing and isinstance(first.loras, LoraNotFoundError)
    assert second == LoadedLoras(none, [])
    loader.close()


def test_without_a_folder_the_option_is_named(pipeline: Pipeline) -> None:
    answers: queue.SimpleQueue[LoadedLoras] = queue.SimpleQueue()
    loader = LoraLoader(pipeline.served.wan, None, answers.put)
    assert loader.names() == []
    loader.request(wire.SetLoras(1, {"a": 1.0}), {"a": 1.0})
    found = answers.get(timeout=20).loras
    assert isinstance(found, LoraNotFoundError) and "--loras DIR" in str(found)
    loader.close()
