"""The clock of the data folder: it does not jump, within a server and from one to the next."""

import time
from pathlib import Path

import pytest

from server.library import film_clock
from server.library.film_clock import FilmClock

DAYS = 3 * 86_400.0


class Machine:
    """The machine's clocks, which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, boot: Path) -> None:
        self.unix, self.steady = 1_700_000_000.0, 1000.0
        self._boot = boot
        self.start("one")
        monkeypatch.setattr(time, "time", lambda: self.unix)
        monkeypatch.setattr(time, "clock_gettime", lambda _: self.steady)
        monkeypatch.setattr(film_clock, "BOOT_ID", boot)

    def start(self, boot: str) -> None:
        self._boot.write_text(f"{boot}\n")

    def run(self, seconds: float) -> None:
        self.unix += seconds
        self.steady += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path / "boot_id")


def test_it_begins_with_the_machines_clock(machine: Machine) -> None:
    for saved in (b"", b"{", b"null", b'{"boot": 1}'):
        clock = FilmClock(saved)
        assert clock.new and clock.now() == machine.unix
    machine.run(10)
    assert clock.now() == clock.shown(clock.now()) == machine.unix


@pytest.mark.parametrize("jump", [DAYS, -DAYS])
def test_it_does_not_jump_and_says_when_the_machine_thinks_it_is(machine: Machine, jump: float) -> None:
    clock = FilmClock()
    began = clock.now()
    machine.unix += jump
    machine.run(10)
    assert clock.now() == began + 10
    assert clock.shown(began + 60) == machine.unix + 50
    machine.unix -= jump
    assert clock.shown(began + 60) == began + 60


def test_what_is_shown_does_not_waver(machine: Machine) -> None:
    clock = FilmClock()
    machine.unix += 0.4
    assert clock.shown(5.0) == 5.0


@pytest.mark.parametrize("jump", [DAYS, -DAYS, 0.0])
def test_a_later_server_goes_on(machine: Machine, jump: float) -> None:
    clock = FilmClock()
    began, saved = clock.now(), clock.save()
    machine.run(3600)
    machine.unix += jump
    later = FilmClock(saved + b"   ")
    assert not later.new and later.now() == began + 3600


@pytest.mark.parametrize("jump", [DAYS, -DAYS, 0.0])
@pytest.mark.parametrize("boot", ["two", ""])
def test_the_time_that_the_machine_was_off_does_not_count(machine: Machine, jump: float, boot: str) -> None:
    clock = FilmClock()
    machine.run(100)
    stopped, saved = clock.now(), clock.save()
    machine.start(boot)
    machine.unix, machine.steady = machine.unix + jump, 5.0
    later = FilmClock(saved)
    assert later.now() == stopped
    machine.run(10)
    assert later.now() == stopped + 10


def test_the_real_clocks() -> None:
    clock = FilmClock()
    assert clock.now() == pytest.approx(time.time(), abs=1)
    assert FilmClock(clock.save()).now() == pytest.approx(time.time(), abs=1)
