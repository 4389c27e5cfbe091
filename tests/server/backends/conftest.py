"""The stub engine imports `engine.wire` from this tree."""

import pytest

from tests.server.backends.harness import ROOT


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
