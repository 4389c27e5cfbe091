"""The recipes at toy size on the CPU: that training sees what serving sees, and that every stage runs and resumes."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import MINI
from engine.models.config import DiTConfig, LightVAEConfig, TextConfig, VAEConfig
from engine.recipes import distill, evaluate, probe, teacher, text, train_vae, world
from engine.recipes.optimizer import Optimiser, orthogonalise
from engine.recipes.run import Run, learning_rate
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import forward

TOY = replace(
    MINI,
    dit=DiTConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, patch=(1, 4, 4), pooled_text=True),
    text=TextConfig(vocab_size=512, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1, length=64),
    vae=VAEConfig(encoder_widths=(16, 16, 16), decoder_widths=(16, 16, 16), decoder_inputs=(16, 16)),
    light_vae=LightVAEConfig(widths=(8, 8, 8)),
)


@pytest.mark.parametrize(
    ("copies", "window", "sink"), [(1, 9, 0), (2, 9, 0), (1, 9, 3), (2, 12, 3), (1, 12, 6), (1, 9, 6)]
)
def test_teacher_forcing_equals_the_cached_rollout(copies: int, window: int, sink: int) -> None:
    """Every noisy chunk gets the flow that a live stream with that clean past would compute."""
    torch.manual_seed(0)
    served = replace(TOY, window=window, sink=sink)
    model = teacher.Model(TOY).requires_grad_(False)
    chunks, batch = teacher.CHUNKS + 2, 2
    context = torch.randn(batch, 16, 3 * chunks, 32, 32)
    noisy = torch.randn(batch, copies, 16, 3 * chunks, 32, 32)
    sigma = torch.rand(batch, copies, chunks)
    text = model.dit.encode_text(torch.randn(batch, 7, 32))
    parts = (1 + copies) * chunks
    spread = text.map(lambda x: x.repeat_interleave(parts, 0))
    attend = teacher.forcing(served, copies, chunks, torch.device("cpu"))
    forced = teacher.forced_flow(model, attend, context, torch.zeros(batch, chunks), noisy, sigma, spread)
    for row in range(batch):
        one = text.map(lambda x, row=row: x[row : row + 1])
        cache = KVCache(served.cache(), layers=2, heads=2, head_dim=32)
        for chunk in range(chunks):
            span = slice(3 * chunk, 3 * chunk + 3)
            for copy in range(copies):
                x = noisy[row : row + 1, copy, :, span]
                flow = forward(model.dit, x, float(sigma[row, copy, chunk]), one, cache)
                assert torch.allclose(flow, forced[row : row + 1, copy, :, span], atol=2e-4)
            forward(model.dit, context[row : row + 1, :, span], 0.0, one, cache)
            cache.advance()


def test_first_chunks_alone_equal_the_cached_rollout() -> None:
    torch.manual_seed(0)
    model = teacher.Model(TOY).requires_grad_(False)
    text = model.dit.encode_text(torch.randn(1, 7, 32))
    x = torch.randn(1, 16, 3, 32, 32)
    alone = model.dit(x, torch.full((1, 3), 700.0), text, teacher.forcing(TOY, 0, 1, torch.device("cpu")))
    cache = KVCache(TOY.cache(), layers=2, heads=2, head_dim=32)
    assert torch.allclose(alone, forward(model.dit, x, 0.7, text, cache), atol=1e-5)


def test_newton_schulz_orthogonalises() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 16, 64), (2, 64, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_the_optimiser_descends() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 1))
    network[0].weight.data = network[0].weight.data.contiguous(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    optimiser = Optimiser(parameters, {"0.weight"}, lr=0.02, decay=0.9)
    x, y = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    losses = []
    for _ in range(60):
        optimiser.schedule(1.0)
        optimiser.clear()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimiser.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    averages = optimiser.averages
    assert set(averages) == set(parameters)
    network.load_state_dict(averages)
    assert float((network(x) - y).square().mean().detach()) < 0.95 * losses[0]


def test_weights_move_as_adamw_and_muon_say() -> None:
    """One step against the formulas written out: AdamW moves by the rate, Muon by an orthogonal matrix."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 32)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = Optimiser(dict(layer.named_parameters()), {"weight"}, lr=0.01, clip=1e9)
    optimiser.schedule(0.5)
    layer(torch.randn(512, 32)).square().sum().backward()
    optimiser.update()
    moved = before["bias"] - layer.bias.detach()
    assert torch.allclose(moved.abs(), torch.full((32,), 0.005), atol=1e-5)
    step = (before["weight"] * (1 - 0.005 * 0.01) - layer.weight.detach()) / (0.005 * 0.2 * 32**0.5)
    assert 0.2 < torch.linalg.svdvals(step).min() <= torch.linalg.svdvals(step).max() < 1.4


def test_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate(0.0, 0) == pytest.approx(0.01)
    assert learning_rate(0.3, 1000) == 1.0
    assert learning_rate(0.8, 1000) == pytest.approx(0.5)
    assert learning_rate(1.0, 1000) == pytest.approx(0.02)


def test_checkpoints_are_cut_into_files_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.recipes.run.SHARD_BYTES", 100)
    run = Run("x", tmp_path, 1)
    tensors = {f"w{i}": torch.randn(8, 4) for i in range(5)}
    run.save("c", tensors, torch.float32)
    assert len(list(tmp_path.glob("c-*.safetensors"))) == 5
    assert all(torch.equal(run.load("c")[name].cpu(), value.cpu()) for name, value in tensors.items())
    with pytest.raises(FileNotFoundError, match="no checkpoint 'd'"):
        run.load("d")


def coarse(params: torch.Tensor, size: int = world.SIZE) -> torch.Tensor:
    """`world.render` with pixels eight times as wide, which is sixty times as fast."""
    small = world.render_reference(params, size // 8)
    return small.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)


@pytest.mark.timeout(600)
def test_every_stage_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student from nothing in half a minute: it draws nothing, but the whole line holds together."""
    monkeypatch.setattr(teacher, "LENGTH", 5)
    monkeypatch.setattr(evaluate, "LATE", 3)
    monkeypatch.setattr(world, "render", coarse)
    config = replace(probe.PROBES["probe-a"], widths=(8, 8, 8, 8), size=64)
    monkeypatch.setattr(probe, "PROBES", {"probe-a": config})

    def run(name: str, seconds: float) -> Run:
        return Run(name, tmp_path, seconds)

    train_vae.train(run("vae", 2), TOY, clips=1)
    latents = run("x", 1).load("vae")["vae.encoder.conv1.weight"]
    train_vae.train(run("vae", 1), TOY, clips=1, decoders_only=True)
    assert torch.equal(run("x", 1).load("vae")["vae.encoder.conv1.weight"], latents)
    text.train(run("text", 1), TOY, count=8, batch=4)
    probe.train(run("probe-a", 1), "probe-a", pool=4, batch=2)
    pools = teacher.code_pools(run("pools", 1), TOY, clips=2, firsts=3, seed=1)
    assert pools.clips.latents.shape == (2, 16, 3 * teacher.LENGTH, 32, 32)
    assert pools.clips.emphasis.shape == (2, 3 * teacher.LENGTH, 32, 32)
    assert {1.0, teacher.EMPHASIS[0]} <= set(pools.clips.emphasis.unique().tolist()) <= {1.0, *teacher.EMPHASIS}
    assert pools.firsts.latents.shape == (3, 16, 3, 32, 32)
    for _ in range(2):  # from nothing, then from its own checkpoint
        teacher.train(run("teacher", 2), TOY, pools, clip_batch=2, first_batch=2, final=True)
    first = run("x", 1).load("teacher")
    distill.train(run("distill", 2), TOY, pools, clip_batch=2, first_batch=2)
    student = run("x", 1).load("student")
    assert set(student) == set(first)
    assert all(value.isfinite().all() for value in student.values())
    assert any(not torch.equal(student[name], first[name]) for name in student if name.startswith("dit"))
    assert all(torch.equal(student[name], first[name]) for name in student if name.startswith("text"))
    options = Namespace(
        served=False,
        prompts=2,
        sampling=["sink=3,context_sigma=0.1"],
        endless=5,
        endless_streams=3,
        drift_minutes=0.1,
        drift_streams=1,
        skip=["teacher"],
        json=None,
        pictures=tmp_path,
        seed=1,
    )
    rows = evaluate.evaluate(run("evaluate", 1), TOY, options).rows
    assert {
        "vae",
        "real renders [probe-a]",
        "student 2 sink=3,context_sigma=0.1 [probe-a]",
        "student 1 [probe-a]",
    } <= set(rows)
    assert any(name.startswith("drift, ") for name in rows)
    assert (tmp_path / "student-2-sink-3context_sigma-0.1.png").exists()


def test_accuracy_counts_only_what_is_there() -> None:
    scenes = torch.zeros(2, 14, dtype=torch.long)
    scenes[1, 0] = 1  # the second scene has one companion
    read = scenes.clone()
    read[0, 1] = 3
    read[0, 8] = 2  # wrong, but the first scene has no companion
    table = evaluate.accuracy(read, scenes)
    assert table["shape"] == 50
    assert table["shape2"] == 100
    assert "shape3" not in table
    changed = torch.zeros_like(scenes, dtype=torch.bool)
    changed[0, 1] = True
    assert evaluate.accuracy(read, scenes, changed)["mean"] == 0


def test_a_dotted_line_does_not_make_up_for_blur() -> None:
    """Over the whole clip the gradient energy is right again, and still the picture counts as less sharp."""
    torch.manual_seed(0)
    target = torch.rand(2, 5, 3, 64, 64)
    blurred = target.unfold(-1, 3, 1).mean(-1).unfold(-2, 3, 1).mean(-1)
    blurred = torch.nn.functional.pad(blurred, (1, 1, 1, 1))
    dotted = blurred.clone()
    dotted[..., -1, ::2] += 2.05
    dotted[..., -1, 1::2] -= 2.05
    ratio = train_vae.energy_ratio(blurred, target), train_vae.energy_ratio(dotted, target)
    assert (ratio[0] < 0.2).all()
    assert ((ratio[1] - 1).abs() < 0.2).all()
    assert train_vae.sharpness_loss(dotted, target) > train_vae.sharpness_loss(blurred, target)


@pytest.mark.gpu
def test_compiled_training_has_the_gradients_of_the_formula() -> None:
    """The VAE's loss compiled for the GPU against the same loss as it is written, down to the last row of a picture."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    bundle = train_vae.Bundle(MINI).to(device)
    frames = torch.randint(0, 256, (2, 9, 3, 64, 64), dtype=torch.uint8, device=device)
    latents = torch.randn(2, 16, 3, 8, 8, device=device)
    out: list[torch.Tensor] = []

    def loss(latents: torch.Tensor, frames: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        drawn = train_vae.light_frames(bundle.light, latents, bundle.stride).float() + shift
        return train_vae.pixel_loss(drawn, frames.float() / 255)

    for function in (loss, torch.compile(loss, dynamic=False)):
        shift = torch.zeros(2, 9, 3, 64, 64, device=device, requires_grad=True)
        function(latents, frames, shift).backward()
        assert shift.grad is not None
        out.append(shift.grad)
    by_row = (out[0] - out[1]).abs().amax(dim=(0, 1, 2, 4)) / out[0].abs().max()
    assert by_row.max() < 1e-3, by_row.tolist()
