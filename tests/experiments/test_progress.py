"""The line without a terminal: how far, and how long still at the pace since the first step."""

import pytest
from rich.console import Console

from experiments.progress import QUIET_SECONDS, Bar


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("experiments.progress.time.monotonic", lambda: now[0])
    return now


def quiet() -> Console:
    return Console(force_terminal=False)


def test_the_estimate_leaves_out_what_came_before_the_first_step(clock, capsys):
    with Bar("run", 100, 20, quiet()) as bar:
        clock[0] += 500.0  # compiling
        bar.update(40, "step 1")  # restored up to 39
        assert bar.left() == "?"
        clock[0] += 30.0
        bar.update(50, "step 11")  # 3 s each
    assert capsys.readouterr().out == "run step 1: 40%, ? left\nrun step 11: 50%, 2:30 left\n"


def test_a_line_at_most_every_quiet_seconds_and_the_last_one_always(clock, capsys):
    with Bar("run", 4, 0, quiet()) as bar:
        for done in (1, 2, 3, 4):
            bar.update(done)
            clock[0] += QUIET_SECONDS / 3
    assert capsys.readouterr().out == "run: 25%, ? left\nrun: 100%, 0:00 left\n"


def test_nothing_is_said_by_processes_that_are_not_the_first(clock, capsys):
    with Bar("run", 2, 0, quiet(), shown=False) as bar:
        bar.update(2)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_with_the_note(capsys):
    console = Console(force_terminal=True, width=120)
    with Bar("run", 2, 0, console) as bar:
        bar.update(1, "loss 2.5")
    printed = capsys.readouterr().out
    assert "run loss 2.5" in printed
    assert "50%" in printed
