"""The rules of the house that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SDK = ROOT / "clients" / "python"
SOURCES = sorted(path for folder in ("engine", "server", "clients/python") for path in (ROOT / folder).rglob("*.py"))
PURE = [
    "server/streams/session.py",
    "server/streams/admission.py",
    "server/streams/playback.py",
    "server/streams/quality.py",
    "server/streams/vocabulary.py",
    "server/rate_limit.py",
    "engine/scheduler.py",
]
WIRE = "engine/wire.py"


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_import_contracts() -> None:
    """In a process of its own: import-linter switches off the loggers of the one that it runs in."""
    code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PURE)
def test_decisions_are_pure(name: str) -> None:
    """Standard library and each other only, and nothing that waits or reads a clock."""
    used = imports(ROOT / name)
    assert used <= set(sys.stdlib_module_names) | {"server", "engine"}
    assert not used & {"asyncio", "threading", "socket", "time", "subprocess", "os"}


def test_the_contract_needs_msgspec_alone() -> None:
    assert imports(ROOT / WIRE) - set(sys.stdlib_module_names) == {"msgspec"}


def test_the_gateway_loads_no_torch() -> None:
    code = "import sys, server.app, server.__main__; sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SDK_IMPORTS = {
    "transport": {"httpx", "websockets"},
    "frames": {"numpy", "PIL"},
    "cli": {"typer", "rich"},
}
"""What the SDK's modules import beside the standard library and each other; those that are not listed, nothing."""


@pytest.mark.parametrize("path", sorted((SDK / "livereel").glob("*.py")), ids=lambda path: path.stem)
def test_the_sdk_imports_neither_server_nor_engine(path: Path) -> None:
    used = imports(path) - set(sys.stdlib_module_names) - {"livereel"}
    assert used == SDK_IMPORTS.get(path.stem, set())


PICKLED = ROOT / "engine/checkpoints/self_forcing.py"


def test_nothing_is_ever_unpickled() -> None:
    """But for `convert`, which lets torch's restricted unpickler read what others publish."""
    for path in SOURCES:
        assert not imports(path) & {"pickle", "cloudpickle", "marshal", "shelve", "dill"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if path == PICKLED and called == "torch.load":
                    assert "weights_only=True" in map(ast.unparse, node.keywords)
                    continue
                assert called not in {"eval", "exec", "torch.load", "torch.save"}, f"{path}: {called}"


def test_serving_reads_no_pickle() -> None:
    code = "import sys, engine.worker, engine.assemble;sys.exit(int('engine.checkpoints.self_forcing' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_names() -> None:
    banned = {"utils", "util", "helpers", "helper", "manager", "handler", "misc", "common"}
    assert not [path for path in SOURCES if path.stem in banned]
    assert not list((ROOT / "tests").rglob("__init__.py"))
