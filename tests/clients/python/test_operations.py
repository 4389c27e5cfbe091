"""The operations cover the API: every route under /v1 that is meant for programs has one."""

import ast
import itertools
import re
from pathlib import Path

from livereel import operations, protocol

from server.app import ROUTES

FOR_PLAYERS = {"/v1/streams/{id}/mjpeg", "/v1/streams/{id}/whep"}
"""What browsers and players open by themselves."""


def requests_in(module: Path) -> set[tuple[str, str]]:
    """Method and path of every request that a module builds; what is filled in is written `{}`."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        arguments = node.args if isinstance(node, ast.Call) else []
        for method, path in itertools.pairwise(arguments):
            if isinstance(method, ast.Constant) and method.value in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                text = ast.unparse(path)
                text = re.sub(r"\{_stream\(stream_id\)\}|^_stream\(stream_id\)$", "/v1/streams/{}", text)
                found.add((method.value, re.sub(r"\{[^{}]+\}", "{}", text.removeprefix("f").strip("'\""))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "download":
            found.add(("GET", re.sub(r"\{[^{}]+\}", "{}", ast.unparse(node.args[0]).removeprefix("f").strip("'\""))))
    return found


def test_every_route_has_an_operation() -> None:
    made = requests_in(Path(operations.__file__)) | requests_in(Path(protocol.__file__))
    served = {
        (route.method, re.sub(r"\{\w+\}", "{}", route.path))
        for route in ROUTES
        if route.path.startswith("/v1") and not any(route.path.startswith(path) for path in FOR_PLAYERS)
    }
    assert served - made == set()
    assert {(method, path) for method, path in made if path.startswith("/v1")} - served == set()
