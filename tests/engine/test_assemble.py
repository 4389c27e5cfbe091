"""A public preset at toy size, from a native store to frames: the whole way that real weights go."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from engine.assemble import assemble
from engine.checkpoints import store
from engine.config import PRESETS, Preset
from engine.models.config import TAEW21, WAN21, DiTConfig, TextConfig
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.models.vae import CausalVAE
from engine.stream.rollout import forward
from engine.transforms.apply import Speed
from engine.transforms.fused import FusedWan
from engine.warmup import warm

TOY = replace(
    PRESETS["longlive-1.3b"],
    name="toy-wan",
    width=64,
    height=32,
    dit=DiTConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=32),
    text=TextConfig(vocab_size=8, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1, length=16),
    vae=replace(WAN21, encoder_widths=(8, 8, 16, 16), decoder_widths=(8, 8, 16, 16), decoder_inputs=(8, 8, 8)),
    light_vae=replace(TAEW21, widths=(16, 16, 8, 8), blocks=(1, 1, 1, 0)),
    steps=(1000, 500),
    first_steps=(1000, 750, 500, 250),
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(PRESETS, TOY.name, TOY)
    torch.manual_seed(0)
    modules = {
        "text_encoder": TextEncoder(TOY.text),
        "dit": CausalWan(TOY.dit),
        "vae": CausalVAE(TOY.vae),
        "light_vae": LightDecoder(TOY.light_vae),
    }
    components = {name: network.state_dict() for name, network in modules.items()}
    assert TOY.statistics is not None
    components["statistics"] = {"mean": torch.tensor(TOY.statistics.mean), "std": torch.tensor(TOY.statistics.std)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.0), (" ", -1.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2)).to_str()
    store.save(tmp_path / "store", components, low_bit=set(), extra={"tokenizer.json": tokenizer})
    return tmp_path / "store"


@pytest.mark.parametrize("decoder", ["light", "full"])
def test_a_wan_preset_streams(weights: Path, decoder: str) -> None:
    pipeline = assemble(TOY.name, weights=weights, dtype=torch.float32, decoder=decoder)  # type: ignore[arg-type]
    warm(pipeline)
    state = pipeline.open("a b", seed=1)
    chunks = [pipeline.next_chunk(state) for _ in range(6)]
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [(9, 32, 64, 3), *[(12, 32, 64, 3)] * 5]
    pipeline.steer(state, "b a", "recache")
    assert len(pipeline.next_chunk(state).frames) == 12
    shown = pipeline.open("a b", seed=1, picture=chunks[0].frames)
    assert len(pipeline.next_chunk(shown).frames) == 12


def test_downloaded_weights_are_found_and_missing_ones_say_how(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEREEL_WEIGHTS", str(weights.parent))
    with pytest.raises(store.StoreError, match=r"run .python -m engine download longlive-1"):
        assemble("longlive-1.3b")
    monkeypatch.setitem(PRESETS, "unpublished", replace(TOY, name="unpublished", sources=()))
    with pytest.raises(store.StoreError, match="part of Livereel: give the folder"):
        assemble("unpublished")
    weights.rename(weights.with_name(TOY.name))
    assert assemble(TOY.name, dtype=torch.float32).preset.name == TOY.name


def test_text_weights_in_8_bits_and_fixed_scales(weights: Path) -> None:
    """Both are what loading does: nothing is left for whoever serves."""
    exact = assemble(TOY.name, weights=weights, dtype=torch.float32)
    pipeline = assemble(
        TOY.name,
        weights=weights,
        dtype=torch.float32,
        text_weights="int8",
        speed=Speed(fused=True, low_bit="fp8", fixed_scales=True),
    )
    encoded, expected = pipeline.encode_prompt("a b"), exact.encode_prompt("a b")
    assert 0 < (encoded - expected).norm() / expected.norm() < 0.05
    assert isinstance(pipeline.dit, FusedWan)
    assert all(p.scale is not None for block in pipeline.dit.blocks for p in block.projections.values())
    assert len(pipeline.next_chunk(pipeline.open("a b", seed=1)).frames) == 9


@pytest.mark.parametrize(
    ("speed", "lines"),
    [
        (Speed(fused=True), []),
        (Speed(fused=True, low_bit="int8"), []),
        (Speed(fused=True, low_bit="nvfp4"), ["nvfp4 products are emulated here, and slower for it: needs a GPU"]),
        (Speed(fused=True, sparse_weights="faster"), ["2:4 sparse weights: none would be faster here"]),
        (
            Speed(fused=True, sparse_weights=frozenset({"up"})),
            ["2:4 sparse products are emulated here, and slower for it: needs a GPU"],
        ),
    ],
)
def test_what_a_device_lacks_is_told(
    weights: Path, speed: Speed, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assemble(TOY.name, weights=weights, dtype=torch.float32, device=torch.device("cpu"), speed=speed)
    assert capsys.readouterr().out.splitlines() == [f"engine: {line}" for line in lines]


def test_the_first_chunk_of_a_scene_has_its_own_steps(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = assemble(TOY.name, weights=weights, dtype=torch.float32)
    levels: list[float] = []

    def noting(model: CausalWan, x: torch.Tensor, sigma: float, *rest: object) -> torch.Tensor:
        levels.append(round(1000 * sigma, 2))
        return forward(model, x, sigma, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.stream.rollout.forward", noting)
    state = pipeline.open("a", seed=1)
    run: list[list[float]] = []
    for index in range(4):
        if index == 2:
            pipeline.steer(state, "b", "cut")
        levels.clear()
        pipeline.next_chunk(state)
        run.append([level for level in levels if level])
        pipeline.commit(state)
    first, later = [1000, 937.5, 833.33, 625], [1000, 833.33]
    assert run == [first, later, first, later]


def test_what_a_store_lacks_is_named_before_any_file_is_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((weights / store.MANIFEST).read_text())

    def without(*names: str) -> None:
        files = {name: entry for name, entry in manifest["files"].items() if not name.startswith(names)}
        (weights / store.MANIFEST).write_text(json.dumps({"files": files}))

    without("vae.")
    pipeline = assemble(TOY.name, weights=weights, dtype=torch.float32)
    assert pipeline.pictures is None
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "_read", None)  # any read fails otherwise
        with pytest.raises(store.StoreError, match="holds no vae"):
            assemble(TOY.name, weights=weights, decoder="full")
        without("light_vae.")
        with pytest.raises(store.StoreError, match="holds no light_vae"):
            assemble(TOY.name, weights=weights)
        without("text_encoder.", "statistics.", "tokenizer.json")
        with pytest.raises(
            store.StoreError, match=r"no text_encoder, no statistics, no tokenizer\.json, which .* needs"
        ):
            assemble(TOY.name, weights=weights)
        with pytest.raises(store.StoreError, match="--weights"):
            assemble("krea-14b")
    without("light_vae.")
    assemble(TOY.name, weights=weights, decoder="full")


def test_weights_of_another_size_are_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(TOY, dit=replace(TOY.dit, num_layers=TOY.dit.num_layers + 1, ffn_dim=2 * TOY.dit.ffn_dim))
    monkeypatch.setitem(PRESETS, TOY.name, other)
    with pytest.raises(store.StoreError, match=r"dit: missing: blocks\.2\..*; wrong shape: blocks\.0\.ffn\.0\.weight"):
        assemble(TOY.name, weights=weights)


@pytest.mark.parametrize("decoder", ["light", "full"])
def test_nothing_that_is_written_over_the_files_reaches_the_picture(weights: Path, decoder: str) -> None:
    """In bfloat16, as they are stored: nothing is converted, which would copy them."""

    def play(first: bool) -> list[torch.Tensor]:
        pipeline = assemble(TOY.name, weights=weights, dtype=torch.bfloat16, decoder=decoder)  # type: ignore[arg-type]
        state = pipeline.open("a b", seed=1)
        shown = [pipeline.next_chunk(state).frames]
        if first:
            for file in weights.iterdir():
                with file.open("r+b") as opened:
                    opened.write(bytes(file.stat().st_size))
        pipeline.commit(state)
        pipeline.steer(state, "b", "recache")
        return [*shown, pipeline.next_chunk(state).frames, pipeline.next_chunk(pipeline.open("b", seed=2)).frames]

    before = play(first=False)
    assert all(map(torch.equal, before, play(first=True)))
    with pytest.raises(store.StoreError):
        play(first=False)


def test_presets_know_their_geometry() -> None:
    preset: Preset = PRESETS["longlive-1.3b"]
    assert (preset.chunk_frames, preset.first_chunk_frames, preset.latent_rows, preset.latent_columns) == (
        12,
        9,
        60,
        104,
    )
