"""The dataclasses of the client have the fields that the server's answers have."""

import dataclasses
from typing import Any

import pytest
from livereel import Model, models
from livereel.parsing import parse

from server.api import response_schemas, schemas

PAIRS = [
    (models.StreamInfo, response_schemas.StreamObject),
    (models.Quality, response_schemas.StreamQuality),
    (models.Failure, response_schemas.StreamFailure),
    (models.Failure, response_schemas.OutputError),
    (models.Failure, response_schemas.VideoFailure),
    (models.Token, response_schemas.TokenObject),
    (models.Output, response_schemas.OutputObject),
    (models.Recording, response_schemas.RecordingObject),
    (models.Video, response_schemas.VideoObject),
    (models.VideoExtra, response_schemas.VideoExtra),
    (models.VideoPage, response_schemas.VideoList),
    (models.Model, response_schemas.ModelObject),
    (models.Lora, response_schemas.LoraObject),
    (models.Readiness, response_schemas.Readiness),
    (models.Matte, schemas.MatteObject),
    (models.PromptChange, schemas.ScheduledPrompt),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
def test_fields_are_the_servers(ours: Any, theirs: Any) -> None:
    assert {field.name for field in dataclasses.fields(ours)} == set(theirs.model_fields)


def test_every_dataclass_is_compared() -> None:
    made = {kind for kind in vars(models).values() if dataclasses.is_dataclass(kind)}
    assert made == {ours for ours, _ in PAIRS}


def test_defaults_are_the_servers() -> None:
    assert dataclasses.asdict(models.Matte()) == schemas.MatteObject().model_dump()


def test_a_newer_or_older_server() -> None:
    """Unknown fields are ignored, and missing ones are None or have their default."""
    model = parse(Model, {"id": "mini", "colour": "red"})
    assert (model.id, model.object, model.width) == ("mini", "model", None)
