"""The process loop over a real socket, on the toy pipeline."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from safetensors.torch import save_file

from engine import wire
from engine.gateway_link import GatewayLink
from engine.pipeline import Chunk, NotFiniteError, Pipeline
from engine.stream.state import StreamState
from engine.worker import Worker

SLOTS, SLOT_BYTES = 2, 12 * 64 * 64 * 3


class Gateway:
    """The other end of the socket and of the ring."""

    def __init__(self, socket: zmq.Socket[bytes], ring: wire.Ring) -> None:
        self.socket, self.ring = socket, ring

    def send(self, message: wire.Message) -> None:
        self.socket.send(wire.encode(message))

    def receive(self, *, beats: bool = False, release: bool = True) -> tuple[wire.ToGateway, bytes | None]:
        while True:
            assert self.socket.poll(20_000), "nothing came"
            message = wire.decode_to_gateway(self.socket.recv())
            if isinstance(message, wire.Frames):
                pixels = self.ring.read(message.slot, message.generation, message.size)
                if release:
                    self.send(wire.Release(message.slot, message.generation))
                return message, pixels
            if beats or not isinstance(message, wire.Heartbeat):
                return message, None

    def expect(self, kind: type[wire.Message]) -> wire.ToGateway:
        message, _ = self.receive()
        assert isinstance(message, kind), message
        return message

    def nothing(self) -> bool:
        """No message but heartbeats within a moment."""
        while self.socket.poll(300):
            if not isinstance(wire.decode_to_gateway(self.socket.recv()), wire.Heartbeat):
                return False
        return True


@pytest.fixture
def batch() -> int:
    """How many streams' chunks the worker may make at once."""
    return 1


@pytest.fixture
def gateway(tmp_path: Path, pipeline: Pipeline, loras: Path, batch: int) -> Iterator[Gateway]:
    address = f"ipc://{tmp_path}/engine.sock"
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    link = GatewayLink(address, parent=None)
    link.start()
    memory = os.memfd_create("test")
    os.ftruncate(memory, wire.Ring.bytes_for(SLOTS, SLOT_BYTES))
    ring = wire.Ring(memory, SLOTS, SLOT_BYTES)
    loop = threading.Thread(target=Worker(pipeline, link, memory, loras, batch=batch).run)
    loop.start()
    gateway = Gateway(socket, ring)
    gateway.send(wire.Layout(SLOTS, SLOT_BYTES))
    yield gateway
    gateway.send(wire.Shutdown())
    loop.join(timeout=20)
    assert not loop.is_alive()
    link.finish()
    assert not link.is_alive()
    ring.close()
    os.close(memory)
    socket.close()
    context.term()


def opened(gateway: Gateway, name: str = "s", limit: int = 0, **options: int) -> None:
    gateway.send(wire.Open(name, "toy", "a red ball", 7, **options))
    if limit:
        gateway.send(wire.Credit(name, limit, 0.5))
        gateway.expect(wire.Started)


def frames(gateway: Gateway) -> tuple[wire.Frames, np.ndarray]:
    message, payload = gateway.receive()
    assert isinstance(message, wire.Frames), message
    assert payload is not None
    pixels = np.frombuffer(payload, np.uint8).reshape(message.frames, message.height, message.width, 3)
    return message, pixels


def test_credit_bounds_generation(gateway: Gateway) -> None:
    opened(gateway)
    assert gateway.nothing()
    gateway.send(wire.Credit("s", 2, 0.5))
    gateway.expect(wire.Started)
    assert [frames(gateway)[0].chunk for _ in range(2)] == [0, 1]
    assert gateway.nothing()
    gateway.send(wire.Credit("s", 2, 0.5))  # cumulative: the same limit again allows nothing
    assert gateway.nothing()
    gateway.send(wire.Credit("s", 3, 0.5))
    message, pixels = frames(gateway)
    assert (message.chunk, message.pts, message.frames) == (2, 21 * 5625, 12)
    assert pixels.shape == (12, 64, 64, 3) and pixels.std() > 0


def test_the_clip_is_trimmed_and_ends(gateway: Gateway) -> None:
    opened(gateway, limit=9, max_frames=15)
    counts = [frames(gateway)[0].frames for _ in range(2)]
    assert counts == [9, 6]
    ended = gateway.expect(wire.Ended)
    assert ended == wire.Ended("s", "finished")


def test_steer_is_answered_and_marked(gateway: Gateway) -> None:
    opened(gateway, limit=1)
    frames(gateway)
    gateway.send(wire.Steer("s", 41, "a blue cube", "cut"))
    assert gateway.expect(wire.Steered) == wire.Steered("s", 41, 1)
    gateway.send(wire.Credit("s", 3, 0.5))
    first, second = frames(gateway)[0], frames(gateway)[0]
    assert (first.chunk, first.applied, first.discontinuity) == (1, 41, True)
    assert (second.applied, second.discontinuity) == (None, False)


def test_unknown_streams_and_models_are_refused(gateway: Gateway) -> None:
    gateway.send(wire.Steer("ghost", 5, "a cube", "soft"))
    fault = gateway.expect(wire.Fault)
    assert isinstance(fault, wire.Fault) and (fault.stream, fault.event) == ("ghost", 5)
    gateway.send(wire.Open("x", "other", "a cube", 1))
    fault = gateway.expect(wire.Fault)
    assert isinstance(fault, wire.Fault) and fault.code == "model_not_found" and "toy" in fault.message
    gateway.send(wire.Close("ghost"))
    gateway.send(wire.Credit("ghost", 4, 0.1))
    assert gateway.nothing()


def test_garbage_does_no_harm(gateway: Gateway) -> None:
    for data in (b"", b"\x80\x04.", b"\xc1" * 1000):
        gateway.socket.send(data)
    opened(gateway, limit=1)
    assert frames(gateway)[0].chunk == 0


def test_close_frees_and_others_go_on(gateway: Gateway) -> None:
    opened(gateway, "a", limit=1)
    frames(gateway)
    opened(gateway, "b", limit=1)
    frames(gateway)
    gateway.send(wire.Close("a"))
    assert gateway.expect(wire.Ended) == wire.Ended("a", "closed")
    gateway.send(wire.Credit("a", 9, 0.1))
    gateway.send(wire.Credit("b", 2, 0.1))
    assert frames(gateway)[0].stream == "b"
    assert gateway.nothing()


def test_a_clip_waits_for_streams(gateway: Gateway) -> None:
    gateway.send(wire.Open("clip", "toy", "a red ball", 7, background=True))
    gateway.send(wire.Credit("clip", 4, 0.0))
    gateway.expect(wire.Started)
    held = []
    for _ in range(SLOTS):  # with no slot free, the clip makes no further chunk
        message, _ = gateway.receive(release=False)
        assert isinstance(message, wire.Frames)
        held.append(message)
    gateway.send(wire.Open("live", "toy", "a red ball", 7))
    gateway.send(wire.Credit("live", 2, 60.0))
    for message in held:
        gateway.send(wire.Release(message.slot, message.generation))
    gateway.expect(wire.Started)
    assert [frames(gateway)[0].stream for _ in range(4)] == ["live", "live", "clip", "clip"]


def test_a_failing_stream_leaves_others_unharmed(gateway: Gateway, pipeline: Pipeline) -> None:
    opened(gateway, "a", limit=1)
    frames(gateway)
    opened(gateway, "b", limit=1)
    frames(gateway)
    healthy: Callable[..., object] = pipeline.next_chunk
    failing = {7: True}

    def next_chunk(state):  # type: ignore[no-untyped-def]
        if failing.pop(state.seed, False):
            raise RuntimeError("CUDA error: an illegal access at 0x7f00")
        return healthy(state)

    pipeline.next_chunk = next_chunk  # type: ignore[method-assign]
    gateway.send(wire.Credit("a", 2, 0.1))
    fault = gateway.expect(wire.Fault)
    assert isinstance(fault, wire.Fault)
    assert (fault.stream, fault.code) == ("a", "generation_failed") and "0x7f00" not in fault.message
    gateway.send(wire.Credit("b", 2, 0.1))
    assert frames(gateway)[0].stream == "b"


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


@pytest.mark.parametrize(("work", "chunk"), [("next_chunk", 1), ("commit", 2)])
def test_want_of_memory_ends_one_stream(
    gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, work: str, chunk: int
) -> None:
    for name in ("a", "b"):
        opened(gateway, name, limit=1)
        frames(gateway)
    healthy: Callable[..., object] = getattr(pipeline, work)
    failing = [True]

    def fails_once(state):  # type: ignore[no-untyped-def]
        return out_of_memory() if state.chunk == chunk and failing and failing.pop() else healthy(state)

    monkeypatch.setattr(pipeline, work, fails_once)
    gateway.send(wire.Credit("a", 2, 0.1))
    if work == "commit":  # the context pass comes after the frames
        frames(gateway)
    fault = gateway.expect(wire.Fault)
    assert isinstance(fault, wire.Fault)
    assert (fault.stream, fault.code) == ("a", "out_of_memory") and "GiB" not in fault.message
    gateway.send(wire.Credit("b", 2, 0.1))
    assert frames(gateway)[0].stream == "b"


def test_a_steer_that_fails_is_refused(gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(gateway, limit=1)
    frames(gateway)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode_prompt", out_of_memory)
        gateway.send(wire.Steer("s", 4, "a blue cube", "recache"))
        fault = gateway.expect(wire.Fault)
        assert isinstance(fault, wire.Fault) and (fault.code, fault.event) == ("out_of_memory", 4)
    gateway.send(wire.Credit("s", 2, 0.1))
    assert frames(gateway)[0].applied is None


def test_a_lost_device_ends_the_loop(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipeline, "next_chunk", lost)
    link = GatewayLink(f"ipc://{tmp_path}/nobody.sock", parent=None)
    monkeypatch.setattr(link, "send", lambda _: None)
    memory = os.memfd_create("test")
    os.ftruncate(memory, wire.Ring.bytes_for(SLOTS, SLOT_BYTES))
    for message in (
        wire.Layout(SLOTS, SLOT_BYTES),
        wire.Open("s", "toy", "a red ball", 7),
        wire.Credit("s", limit=1, due_in=0.5),
    ):
        link.inbox.put(message)
    with pytest.raises(torch.AcceleratorError):
        Worker(pipeline, link, memory).run()
    os.close(memory)


def test_a_full_ring_holds_back_chunks_and_loses_none(gateway: Gateway) -> None:
    opened(gateway, "a", limit=5)
    kept = []
    for _ in range(SLOTS):
        message, pixels = gateway.receive(release=False)
        assert isinstance(message, wire.Frames)
        kept.append((message, pixels))
    assert gateway.nothing()
    # The loop goes on: it answers, and says that it moves.
    gateway.send(wire.Steer("a", 9, "a blue cube", "cut"))
    assert gateway.expect(wire.Steered) == wire.Steered("a", 9, SLOTS)
    beat, _ = gateway.receive(beats=True)
    assert isinstance(beat, wire.Heartbeat) and beat.step_age < 5
    # What waits is still there, and a slot given back twice, or by a wrong generation, is free but once.
    for message, pixels in kept:
        assert gateway.ring.read(message.slot, message.generation, message.size) == pixels
    first = kept[0][0]
    gateway.send(wire.Release(first.slot, first.generation + 100))
    assert gateway.nothing()
    for _ in range(2):
        gateway.send(wire.Release(first.slot, first.generation))
    message, _ = gateway.receive(release=False)
    assert isinstance(message, wire.Frames) and (message.chunk, message.slot) == (SLOTS, first.slot)
    assert gateway.nothing()
    with pytest.raises(wire.DamagedError):
        gateway.ring.read(first.slot, first.generation, first.size)
    gateway.send(wire.Release(message.slot, message.generation))
    assert frames(gateway)[0].chunk == SLOTS + 1


def test_heartbeats_tell_that_the_loop_hangs(gateway: Gateway, pipeline: Pipeline) -> None:
    hangs = threading.Event()
    healthy: Callable[..., object] = pipeline.next_chunk

    def next_chunk(state):  # type: ignore[no-untyped-def]
        hangs.wait(20)
        return healthy(state)

    pipeline.next_chunk = next_chunk  # type: ignore[method-assign]
    opened(gateway, limit=1)
    ages = []
    while len(ages) < 2 or ages[-1] <= 1.0:
        message, _ = gateway.receive(beats=True)
        assert isinstance(message, wire.Heartbeat)
        ages.append(message.step_age)
    hangs.set()
    assert frames(gateway)[0].chunk == 0


def test_heartbeats_go_out_while_idle(gateway: Gateway) -> None:
    message, _ = gateway.receive(beats=True)
    assert isinstance(message, wire.Heartbeat)
    assert message.resident_bytes > 0
    message, _ = gateway.receive(beats=True)
    assert isinstance(message, wire.Heartbeat) and message.step_age < 5


def test_a_stream_opens_with_a_picture_or_says_why_not(gateway: Gateway) -> None:
    bytes_of = 64 * 64 * 3
    gateway.send(wire.Open("p", "toy", "a red ball", seed=1, picture=bytes(2 * bytes_of)))
    gateway.send(wire.Credit("p", limit=1, due_in=0.5))
    gateway.expect(wire.Started)
    frames = gateway.expect(wire.Frames)
    assert isinstance(frames, wire.Frames)
    assert (frames.chunk, frames.pts, frames.frames) == (0, 0, 12)
    gateway.send(wire.Open("q", "toy", "a red ball", seed=1, picture=bytes(bytes_of + 1)))
    fault = gateway.expect(wire.Fault)
    assert isinstance(fault, wire.Fault)
    assert (fault.code, fault.stream) == ("picture_refused", "q")


def test_a_stream_that_cannot_be_opened_leaves_the_engine_up(
    gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_start_from", fails)
        gateway.send(wire.Open("p", "toy", "a red ball", seed=1, picture=bytes(64 * 64 * 3)))
        fault = gateway.expect(wire.Fault)
        assert isinstance(fault, wire.Fault)
        assert (fault.code, fault.stream) == ("generation_failed", "p")
    opened(gateway, "q", limit=1)
    frames(gateway)


@pytest.fixture
def loras(tmp_path: Path, pipeline: Pipeline) -> Path:
    """A folder with two random LoRAs for the toy, and one for another model."""
    folder = tmp_path / "loras"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, dim in (("ink", 64), ("oil", 64), ("foreign", 32)):
        tensors = {}
        for layer in ("blocks.0.self_attn.v", "blocks.1.cross_attn.v"):
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = torch.randn(4, dim, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(dim, 4, generator=generator)
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def answer(gateway: Gateway, event: int, loras: dict[str, float] | None) -> wire.ToGateway:
    gateway.send(wire.SetLoras(event, loras))
    return gateway.receive()[0]


def test_loras_change_the_frames_and_leave_no_trace(gateway: Gateway) -> None:
    def run(name: str) -> list[np.ndarray]:
        opened(gateway, name, limit=2)
        return [frames(gateway)[1] for _ in range(2)]

    names = ["foreign", "ink", "oil"]
    assert answer(gateway, 1, None) == wire.Loras(1, names, {})
    clean = run("a")
    assert answer(gateway, 2, {"oil": 1.0, "ink": 0.5}) == wire.Loras(2, names, {"ink": 0.5, "oil": 1.0})
    styled = run("b")
    assert not np.array_equal(clean[0], styled[0])
    assert answer(gateway, 3, {}) == wire.Loras(3, names, {})
    assert all(np.array_equal(x, y) for x, y in zip(clean, run("c"), strict=True))


def test_loras_change_at_a_chunk_boundary_of_a_running_stream(gateway: Gateway, pipeline: Pipeline) -> None:
    opened(gateway, "plain", limit=4)
    plain = [frames(gateway)[1] for _ in range(4)]
    opened(gateway, "s", limit=2)
    before = [frames(gateway)[1] for _ in range(2)]
    assert isinstance(answer(gateway, 1, {"ink": 2.0}), wire.Loras)
    gateway.send(wire.Credit("s", 4, 0.5))
    after = [frames(gateway)[1] for _ in range(2)]
    assert all(np.array_equal(x, y) for x, y in zip(plain, before, strict=False))
    assert not np.array_equal(plain[2], after[0])


def test_loras_that_cannot_be_applied_change_nothing(gateway: Gateway) -> None:
    assert isinstance(answer(gateway, 1, {"ink": 1.0}), wire.Loras)
    for event, (name, code) in enumerate(
        [("none", "lora_not_found"), ("../ink", "lora_not_found"), ("foreign", "lora_unusable")], start=2
    ):
        fault = answer(gateway, event, {"oil": 1.0, name: 1.0})
        assert isinstance(fault, wire.Fault)
        assert (fault.code, fault.stream, fault.event) == (code, None, event)
        assert name in fault.message
    found = answer(gateway, 9, None)
    assert isinstance(found, wire.Loras) and found.applied == {"ink": 1.0}


def test_want_of_memory_leaves_the_model_clean(
    gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = pipeline.dit.blocks[0].self_attn.v.weight
    clean = weight.clone()
    assert isinstance(answer(gateway, 1, {"ink": 1.0}), wire.Loras)
    assert not torch.equal(weight, clean)

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("engine.transforms.lora.merge", fails)
    fault = answer(gateway, 2, {"oil": 1.0})
    assert isinstance(fault, wire.Fault) and (fault.code, fault.event) == ("lora_failed", 2)
    found = answer(gateway, 3, None)
    assert isinstance(found, wire.Loras) and found.applied == {}
    assert torch.equal(weight, clean)


def test_fewer_steps_from_the_next_chunk_on(gateway: Gateway) -> None:
    opened(gateway, limit=1)
    assert frames(gateway)[0].steps is None
    gateway.send(wire.SetSteps("ghost", 1))
    gateway.send(wire.SetSteps("s", 1))
    gateway.send(wire.Credit("s", 2, 0.5))
    assert frames(gateway)[0].steps == 1
    # As many as the model has, or more, are the model's own.
    gateway.send(wire.SetSteps("s", 9))
    gateway.send(wire.Credit("s", 3, 0.5))
    assert frames(gateway)[0].steps is None


class Batches:
    """Two streams that play, and how many were in each batch that was made of them since."""

    def __init__(self, gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gateway, self.sizes = gateway, list[int]()
        for name in "ab":
            opened(gateway, name, limit=1)
            frames(gateway)
        self.ahead: Callable[..., list[Chunk | NotFiniteError]] = pipeline.next_chunks
        self._busy = threading.Event()
        self._encode: Callable[[str], torch.Tensor] = pipeline.encode_prompt
        monkeypatch.setattr(pipeline, "next_chunks", self._next_chunks)
        monkeypatch.setattr(pipeline, "encode_prompt", self._encode_later)

    def _next_chunks(self, states: list[StreamState]) -> list[Chunk | NotFiniteError]:
        self.sizes.append(len(states))
        return self.ahead(states)

    def _encode_later(self, prompt: str) -> torch.Tensor:
        assert self._busy.wait(20)
        return self._encode(prompt)

    def allow(self, limit: int) -> None:
        """Let both make chunks up to this one, in a moment in which the step loop is at something else."""
        self._busy.clear()
        opened(self.gateway, f"other{limit}")
        for name in "ab":
            self.gateway.send(wire.Credit(name, limit, 60.0))
        time.sleep(0.2)  # the wire thread has them now
        self._busy.set()


@pytest.fixture
def batches(gateway: Gateway, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(gateway, pipeline, monkeypatch)


@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_are_made_in_batches(gateway: Gateway, batches: Batches, batch: int) -> None:
    batches.allow(3)
    made = [frames(gateway) for _ in range(4)]
    assert {(message.stream, message.chunk) for message, _ in made} == {(n, i) for n in "ab" for i in (1, 2)}
    assert set(batches.sizes) == {batch}
    for index in (1, 2):  # the same seed and prompt
        one, other = (pixels for message, pixels in made if message.chunk == index)
        assert np.array_equal(one, other)


@pytest.mark.parametrize("batch", [2])
def test_a_stream_that_ends_leaves_its_batch(gateway: Gateway, batches: Batches) -> None:
    batches.allow(2)
    for _ in range(2):
        frames(gateway)
    gateway.send(wire.Close("a"))
    assert gateway.expect(wire.Ended) == wire.Ended("a", "closed")
    gateway.send(wire.Credit("b", 3, 1.0))
    assert frames(gateway)[0].stream == "b"
    assert batches.sizes == [2, 1]


@pytest.mark.parametrize("batch", [2])
def test_a_batch_that_fails_is_made_one_by_one(gateway: Gateway, batches: Batches) -> None:
    """And whoever fails alone is over; the other goes on."""
    healthy, bad = batches.ahead, []

    def ahead(states: list[StreamState]) -> list[Chunk | NotFiniteError]:
        if len(states) > 1 or states[0] in bad:
            bad.extend(states[:1])
            out_of_memory()
        return healthy(states)

    batches.ahead = ahead
    batches.allow(2)
    kinds = {type(message): message for message, _ in (gateway.receive() for _ in range(2))}
    fault, going = kinds[wire.Fault], kinds[wire.Frames]
    assert isinstance(fault, wire.Fault) and isinstance(going, wire.Frames)
    assert fault.code == "out_of_memory" and {fault.stream, going.stream} == {"a", "b"}
    assert batches.sizes == [2, 1, 1]
    batches.ahead = healthy
    gateway.send(wire.Credit(going.stream, 3, 1.0))
    assert frames(gateway)[0].chunk == 2


@pytest.mark.parametrize("batch", [2])
def test_of_a_batch_only_the_stream_that_is_not_finite_ends(gateway: Gateway, batches: Batches) -> None:
    healthy = batches.ahead

    def ahead(states: list[StreamState]) -> list[Chunk | NotFiniteError]:
        made = healthy(states)
        return [NotFiniteError("chunk 1 has values that are not finite"), *made[1:]] if len(states) > 1 else made

    batches.ahead = ahead
    batches.allow(3)
    messages = [gateway.receive()[0] for _ in range(3)]
    (fault,) = (message for message in messages if isinstance(message, wire.Fault))
    assert fault.code == "not_finite"
    other = "b" if fault.stream == "a" else "a"
    assert [(m.stream, m.chunk) for m in messages if isinstance(m, wire.Frames)] == [(other, 1), (other, 2)]


@pytest.mark.parametrize("batch", [2])
def test_a_context_pass_that_fails_for_a_batch_is_made_one_by_one(
    gateway: Gateway, pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy: Callable[..., None] = pipeline.commit

    def commit(*states: StreamState) -> None:
        if len(states) > 1:
            out_of_memory()
        healthy(*states)

    monkeypatch.setattr(pipeline, "commit", commit)
    batches.allow(3)
    made = [frames(gateway) for _ in range(4)]
    assert batches.sizes == [2, 2]
    one, other = (pixels for message, pixels in made if message.chunk == 2)
    assert np.array_equal(one, other)
