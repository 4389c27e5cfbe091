import pytest
import torch

from engine.checkpoints import layouts, wan
from engine.config import PRESETS
from engine.models.dit import CausalWan
from engine.models.text_encoder import TextEncoder


@pytest.mark.parametrize("name", ["mini", "self-forcing-1.3b"])
def test_the_text_encoders_tensors_are_known(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        state = TextEncoder(preset.text).state_dict()
    assert layouts.text_encoder(preset.text) == {name: tuple(value.shape) for name, value in state.items()}
    with torch.device("meta"):
        dit = CausalWan(preset.dit).state_dict()
    assert wan.tensors(preset.dit) == {name: tuple(value.shape) for name, value in dit.items()}
