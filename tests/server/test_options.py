"""Options declared as dataclass fields."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from server.options import above, at_least, between, check_options, option, options_of, parse_options


@dataclass(frozen=True, kw_only=True)
class Settings:
    size: int = option(3, "how large", bounds=between(1, 9))
    wait_s: float = option(1.5, "100 % patience", flag="wait", metavar="S", bounds=above(0, "seconds"))
    threads: int | None = option(None, "how many", bounds=at_least(1), unset="one for each core")
    folder: Path | None = option(None, "where")
    hosts: tuple[str, ...] = option((), "which", unset="none")
    kind: Literal["a", "b"] = option("a", "what kind")
    password: str = option("", "a secret", secret=True)
    rest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(self)


def parse(*arguments: str, **environment: str) -> dict[str, Any]:
    return parse_options(Settings, argparse.ArgumentParser("test"), arguments, environment)


def test_defaults_are_those_of_the_fields() -> None:
    assert Settings(**parse()) == Settings()


def test_a_flag_comes_before_its_variable() -> None:
    assert parse("--size", "4", LIVEREEL_SIZE="5")["size"] == 4
    assert parse(LIVEREEL_SIZE="5")["size"] == 5


def test_values_have_the_type_of_their_fields() -> None:
    values = parse("--wait", "2", "--hosts", "a, b,", LIVEREEL_THREADS="2", LIVEREEL_FOLDER="/x")
    assert (values["wait_s"], values["hosts"], values["threads"]) == (2.0, ("a", "b"), 2)
    assert isinstance(values["wait_s"], float)
    assert values["folder"] == Path("/x")
    assert parse(LIVEREEL_HOSTS="")["hosts"] == ()


def test_secrets_come_from_the_environment_alone(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(**parse(LIVEREEL_PASSWORD="hush"))
    assert settings.password == "hush"
    assert "hush" not in repr(settings)
    with pytest.raises(SystemExit):
        parse("--password", "hush")
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size 0 must be between 1 and 9"),
        ({"size": 10}, "size 10 must be between 1 and 9"),
        ({"wait_s": 0.0}, "wait 0.0 must be above 0 seconds"),
        ({"wait_s": float("nan")}, "wait nan must be above 0 seconds"),
        ({"wait_s": float("inf")}, "wait inf must be above 0 seconds"),
        ({"threads": 0}, "threads 0 must be at least 1"),
        ({"kind": "c"}, "kind c must be a or b"),
    ],
)
def test_errors_name_the_option_and_what_it_must_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Settings(**values)


def test_text_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(LIVEREEL_SIZE="large")
    assert "argument --size: invalid int value: 'large'" in capsys.readouterr().err


def test_help_has_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help", LIVEREEL_SIZE="7")
    text = capsys.readouterr().out
    for part in ("how large (7)", "100 % patience (1.5)", "how many (one for each core)", "which (none)", "{a,b}"):
        assert part in text


def test_options_are_listed_with_their_variables() -> None:
    found = {each.flag: each for each in options_of(Settings)}
    assert list(found) == ["size", "wait", "threads", "folder", "hosts", "kind", "password"]
    assert found["wait"].variable == "LIVEREEL_WAIT"
    assert found["kind"].bounds_text == "a or b"
