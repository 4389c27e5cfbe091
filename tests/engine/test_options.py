"""The command line of the engine process."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import options
from engine.config import PRESETS
from tests.permissions import run, unusable_folders

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
        (["--threads", "1025"], "argument --threads: 1025 must be at most 1024"),
        (["--frames", "4"], "unrecognized arguments: --frames 4"),
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


TRY_LORAS = """
import sys
from engine import options
for path in sys.argv[1:]:
    try:
        options.parse(["mini", "--socket", "x", "--frames-fd", "3", "--loras", path])
        print(f"{path} is accepted", file=sys.stderr)
    except SystemExit:
        pass
"""


def test_folders_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    folders = unusable_folders(tmp_path)
    found = run("-c", TRY_LORAS, *map(str, folders))
    assert found.returncode == 0, found.stderr
    for sentence, (path, says) in zip(found.stderr.splitlines(), folders.items(), strict=True):
        assert sentence.startswith(f"engine: argument --loras: {path} ")
        assert says in sentence


def test_an_unknown_model_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(["nope", *REQUIRED[1:]])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"engine: there is no model 'nope': choose from {', '.join(sorted(PRESETS))}\n"
