"""What each room of the house may import: allow-lists, so that a new import is a decision that a reviewer sees.

`ALLOWED` names a package or a module and what it may import beside the standard library and itself; the longest name
that fits a module decides. Imports within functions and for type checkers count as well: they are dependencies, too.
Import cycles are looked for among the imports that run.
"""

import ast
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "server")


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMPURE = names(
    "asyncio concurrent datetime http io logging multiprocessing os pathlib queue random secrets select selectors "
    "shutil signal socket ssl subprocess tempfile threading time urllib"
)
"""Parts of the standard library that wait, read a clock, draw chance, or reach files, processes and networks."""


@dataclass(frozen=True)
class Rule:
    """What a package may import."""

    allowed: frozenset[str]
    pure: bool
    """Nothing of `IMPURE` either."""


def rule(allowed: str = "", *, pure: bool = False) -> Rule:
    return Rule(names(allowed), pure)


ALLOWED: dict[str, Rule] = {
    # the engine process: networks and arithmetic at the bottom, the process loop at the top
    "engine.wire": rule("msgspec"),
    "engine.scheduler": rule(pure=True),
    "engine.models.config": rule("torch", pure=True),
    "engine.models.tokenizer": rule("ftfy tokenizers"),
    "engine.models.text_encoder": rule("torch transformers engine.models"),
    "engine.models": rule("torch engine.ops engine.models.config", pure=True),
    "engine.stream.steps": rule(pure=True),
    "engine.config": rule("engine.models.config engine.stream.steps", pure=True),
    "engine.ops": rule("torch triton"),
    "engine.memory": rule("engine.config engine.checkpoints.layouts", pure=True),
    "engine.checkpoints.hub": rule("huggingface_hub engine.checkpoints engine.config"),
    "engine.checkpoints": rule(
        # the modules whose tensors a store holds, or whose files it writes; int8 weights are rounded as when served
        "torch safetensors tokenizers engine.config engine.models.config engine.models.tokenizer engine.models.vae "
        "engine.models.light_vae engine.ops.quant engine.wire"
    ),
    "engine.stream": rule("torch numpy engine.config engine.models engine.ops engine.stream.steps engine.wire"),
    "engine.transforms": rule(
        "torch engine.checkpoints.lora engine.config engine.models engine.ops engine.stream engine.timing"
    ),
    "engine.offload": rule("torch engine.config engine.models"),
    "engine.timing": rule("torch"),
    "engine.pipeline": rule("torch engine.config engine.models engine.stream engine.transforms engine.wire"),
    "engine.warmup": rule("torch engine.pipeline engine.stream"),
    "engine.assemble": rule(
        "torch engine.checkpoints engine.config engine.models engine.offload engine.pipeline engine.stream "
        "engine.transforms engine.warmup engine.wire"
    ),
    "engine.lora_loader": rule("engine.checkpoints engine.models engine.transforms engine.wire"),
    "engine.gateway_link": rule("msgspec zmq engine.lora_loader engine.wire"),
    "engine.worker": rule(
        "torch engine.checkpoints engine.gateway_link engine.lora_loader engine.pipeline engine.scheduler "
        "engine.stream engine.wire"
    ),
    "engine.standby": rule(),
    "engine.options": rule("engine.config"),
    "engine.cli": rule("torch engine.checkpoints engine.config engine.memory engine.transforms"),
    "engine.serve": rule(
        "torch engine.assemble engine.checkpoints engine.config engine.gateway_link engine.pipeline engine.standby "
        "engine.transforms engine.warmup engine.wire engine.worker"
    ),
    "engine.__main__": rule("engine.cli engine.options engine.serve"),
    "engine.bench": rule(
        "torch triton flash_attn PIL websockets zmq engine.assemble engine.checkpoints engine.config engine.models "
        "engine.ops engine.options engine.pipeline engine.scheduler engine.stream engine.timing engine.transforms "
        "engine.warmup engine.wire engine.worker"
    ),
    "engine.recipes": rule(
        "torch numpy PIL cupy safetensors engine.assemble engine.checkpoints engine.config engine.models engine.ops "
        "engine.stream"
    ),
    "engine": rule(),
    # the gateway process: what decides
    "server.rate_limit": rule(pure=True),
    "server.streams.admission": rule(pure=True),
    "server.streams.playback": rule(pure=True),
    "server.streams.quality": rule("server.streams.playback", pure=True),
    "server.streams.session": rule("server.streams.admission", pure=True),
    "server.streams.vocabulary": rule("engine.wire", pure=True),
    "server.library.clip": rule("msgspec engine.wire", pure=True),
    # what the rooms share
    "server.aio": rule(),
    "server.options": rule(),
    "server.errors": rule("starlette"),
    "server.logs": rule("server.auth.tokens server.auth.keys server.errors"),
    "server.metrics": rule("prometheus_client server.streams.session"),
    "server.tracing": rule("opentelemetry server.errors server.media.frames"),
    "server.sandbox": rule(),
    "server.config": rule("server.auth.keys server.egress.destination server.library.store server.options"),
    "server.protocols": rule("h11 starlette uvicorn websockets server.errors server.rate_limit"),
    # the rooms
    "server.backends": rule("PIL msgspec zmq engine.wire server.aio server.temporary"),
    "server.uploads": rule("PIL av server.errors server.sandbox"),
    "server.media": rule(
        "PIL aioice aiortc av engine.wire server.aio server.errors server.library.recording_writer server.metrics "
        "server.rate_limit"
    ),
    "server.library": rule(
        "PIL av msgspec engine.wire server.aio server.auth.keys server.backends.base server.errors server.library.clip "
        "server.media server.metrics server.streams.admission server.streams.engine_link server.streams.vocabulary "
        "server.temporary"
    ),
    "server.streams": rule(
        "msgspec engine.wire server.aio server.auth.keys server.backends.base server.config server.errors "
        "server.library server.media server.metrics server.streams server.tracing server.uploads.queue"
    ),
    "server.egress": rule(
        "av h11 msgspec server.aio server.config server.errors server.media server.metrics server.sandbox "
        "server.streams"
    ),
    "server.auth": rule("starlette server.config server.errors server.rate_limit"),
    "server.api": rule(
        "fastapi msgspec pydantic pydantic_core starlette engine.wire server.aio server.auth server.config "
        "server.egress server.errors server.library server.media server.metrics server.protocols server.streams "
        "server.uploads"
    ),
    "server.middleware": rule(
        "fastapi opentelemetry starlette server.api server.auth server.config server.errors server.logs "
        "server.protocols server.streams server.tracing server.uploads.queue"
    ),
    "server.app": rule(
        "fastapi starlette server.api server.auth server.backends.base server.config server.egress server.metrics "
        "server.middleware server.streams server.tracing"
    ),
    "server.__main__": rule(
        "fastapi uvicorn server.app server.auth server.backends server.config server.logs server.middleware "
        "server.protocols server.streams server.tracing"
    ),
    "server.bench": rule(
        "PIL aiortc httpx msgspec playwright websockets zmq engine.wire server.__main__ server.backends server.config "
        "server.logs"
    ),
    "server": rule(),
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    """Every module of both processes below `root`, by dotted name."""
    return {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}


def typing_only(tree: ast.AST) -> set[int]:
    """The ids of all nodes under `if TYPE_CHECKING:`."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, bool]]:
    """What a file imports, as full names of our modules or of others', and whether the import runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unrun = typing_only(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in unrun
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module, id(node) not in unrun


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def governing(module: str, rules: Mapping[str, Rule]) -> str | None:
    """The longest name in the table that the module lies in."""
    return max((name for name in rules if within(module, name)), key=len, default=None)


def violations_of(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Every import of one module that no rule allows."""
    if (name := governing(module, ALLOWED)) is None:
        yield f"{module} has no rule: add one to ALLOWED"
        return
    rule = ALLOWED[name]
    for imported, _ in imports(path, known):
        top = imported.split(".")[0]
        if top in sys.stdlib_module_names:
            allowed = not (rule.pure and top in IMPURE)
        else:
            own = within(imported, name) and governing(imported, ALLOWED) == name
            allowed = own or any(within(imported, other) for other in rule.allowed)
        if not allowed:
            yield f"{module} may not import {imported} (rule of {name})"


def violations(root: Path) -> list[str]:
    known = modules(root)
    return [found for module, path in known.items() for found in violations_of(module, path, known)]


def cycles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    known = modules(root)
    graph = {
        module: sorted({name for name, runs in imports(path, known) if runs and name in known and name != module})
        for module, path in known.items()
    }
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_every_import_is_allowed() -> None:
    assert not violations(ROOT)


def test_no_module_imports_itself_through_others() -> None:
    assert not cycles(ROOT)


def test_no_rule_is_left_over() -> None:
    """Each name in the table, and each of ours that a rule allows, exists."""
    known = modules(ROOT)
    ours = {name for rule in ALLOWED.values() for name in rule.allowed if name.split(".")[0] in PACKAGES}
    assert not [name for name in (*ALLOWED, *ours) if not any(within(module, name) for module in known)]


# the contracts can be broken


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of both processes, to be broken."""
    root = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, root / package, ignore=lambda _, names: [n for n in names if "." in n and n[-3:] != ".py"]
        )
    return root


def planted(root: Path, rule: str) -> Path:
    """The file of a module that the rule governs."""
    return next(path for module, path in modules(root).items() if governing(module, ALLOWED) == rule)


def broken(path: Path, line: str, root: Path) -> set[str]:
    """The violations that this line at the end of the file adds."""
    module, known, text = module_name(path, root), modules(root), path.read_text(encoding="utf-8")
    before = set(violations_of(module, path, known))
    try:
        path.write_text(f"{text}\n{line}\n", encoding="utf-8")
        return set(violations_of(module, path, known)) - before
    finally:
        path.write_text(text, encoding="utf-8")


FOREIGN = ("engine.recipes.run", "server.app", "engine.assemble")
"""Modules that hardly anything may import."""


@pytest.mark.parametrize("name", ALLOWED)
def test_each_contract_can_be_broken(name: str, copied: Path) -> None:
    path, rule = planted(copied, name), ALLOWED[name]
    module = module_name(path, copied)
    assert broken(path, "def f():\n    import a_new_dependency", copied)
    for foreign in FOREIGN:
        if not within(module, foreign) and not any(within(foreign, other) for other in (*rule.allowed, name)):
            package, _, leaf = foreign.rpartition(".")
            assert broken(path, f"from {package} import {leaf}", copied), foreign
    if rule.pure:
        assert broken(path, "import os", copied)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("engine/checkpoints/store.py", "from engine.transforms import apply"),
        ("engine/models/light_vae.py", "from engine.scheduler import pick"),
        ("engine/models/light_vae.py", "import transformers"),
        ("engine/models/light_vae.py", "import os"),
        ("server/streams/playback.py", "import time"),
        ("server/media/frames.py", "from engine import config"),
        ("engine/worker.py", "import server.errors"),
    ],
)
def test_what_once_slipped_through_is_caught(file: str, line: str, copied: Path) -> None:
    assert broken(copied / file, line, copied)


def test_a_cycle_is_seen(copied: Path) -> None:
    path = copied / "engine/wire.py"
    text = path.read_text(encoding="utf-8")
    before = cycles(copied)
    try:
        path.write_text(f"{text}\nfrom engine import worker\n", encoding="utf-8")
        assert any({"engine.wire", "engine.worker"} <= set(group) for group in cycles(copied)), before
    finally:
        path.write_text(text, encoding="utf-8")
