"""The command line of the engine process."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import options

REQUIRED = ["mini", "--socket", "ipc:///tmp/x", "--frames-fd", "3"]


def test_defaults() -> None:
    found = options.parse(REQUIRED)
    assert (found.model, found.frames_fd, found.batch, found.spare, found.plain) == ("mini", 3, 1, False, False)
    assert (found.decoder, found.text_encoder, found.kv_cache, found.keep) == ("light", "resident", "exact", 1.0)
    assert found.threads >= 1
    assert found.sparse_weights is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "argument --threads: 0 must be at least 1"),
        (["--batch", "-1"], "argument --batch: -1 must be at least 1"),
        (["--batch", "many"], "argument --batch: invalid positive value: 'many'"),
        (["--loras", "/no/such"], "argument --loras: /no/such is not a folder"),
        (["--low-bit", "int2"], "argument --low-bit: invalid choice"),
    ],
)
def test_errors_name_the_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse([*REQUIRED, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_paths_are_paths(tmp_path: Path) -> None:
    found = options.parse([*REQUIRED, "--loras", str(tmp_path), "--weights", "w"])
    assert (found.loras, found.weights) == (tmp_path, Path("w"))


def test_parsing_loads_no_torch() -> None:
    code = f"import sys; from engine import options; options.parse({REQUIRED}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
