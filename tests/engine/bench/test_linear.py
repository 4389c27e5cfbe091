"""The table of linear operators at toy size: every form is timed, and what fails is told."""

import json
from pathlib import Path

import pytest
import torch

from engine.bench import linear
from engine.config import Preset
from engine.transforms.low_bit import Projection, WeightFormat

CPU = torch.device("cpu")


def test_every_form_at_every_shape(toy: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    found = linear.block(toy.dit, 40, CPU, torch.float32, 1e9)
    assert set(found) == set(linear.shapes(toy.dit))
    names = [name for name, _, _ in linear.FORMATS]
    for rows in found.values():
        assert [row.name for row in rows] == names
        errors = {row.name: row.error for row in rows}
        assert errors["as it is"] < 1e-6 and errors["2:4"] < 1e-6
        assert 0.01 < errors["fp8, a scale a row"] < 0.06 and 0.05 < errors["nvfp4"] < 0.2
        assert all(row.us > 0 for row in rows)
        faults = {row.name for row in rows if row.fault}
        assert faults == {name for name in names if "fp" in name and "alone" not in name} | {"2:4"}
    printed = capsys.readouterr().out
    assert "needs a GPU" in printed and "would keep 2:4 for: none" in printed


def test_what_fails_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(Projection, "__call__", broken)
    weights, inputs = linear.operands(8, 32, 32, CPU, torch.float32)
    row = linear.measure("fp8", WeightFormat("fp8"), False, weights, inputs)
    assert row.fault == "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" and row.us != row.us
    odd = linear.operands(8, 30, 32, CPU, torch.float32)
    assert "multiple of 32" in str(linear.measure("mxfp8", WeightFormat("mxfp8"), False, *odd).fault)


def test_small_batches(toy: Preset) -> None:
    found = linear.small(toy.text, CPU, torch.float32)
    assert len(found) == 6
    for rows in found.values():
        assert [row.fault for row in rows] == [None] * 3
        assert rows[2].error < 0.02


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["linear", "mini", "--tokens", "16", "--json", str(report)])
    linear.main()
    assert {"device", "ceiling", "mini", "text"} == json.loads(report.read_text()).keys()


def test_unknown_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["linear", "maxi"])
    with pytest.raises(SystemExit):
        linear.main()
    assert "there is no preset maxi: choose from" in capsys.readouterr().err


def test_shapes_are_those_of_a_chunk(toy: Preset) -> None:
    from engine.config import PRESETS

    assert linear.chunk_tokens(PRESETS["self-forcing-1.3b"]) == linear.chunk_tokens(PRESETS["krea-14b"]) == 4680
    assert sum(count for _, _, count in linear.shapes(toy.dit).values()) == 6
