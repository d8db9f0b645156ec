"""How far a command is, in a terminal and in a file."""

import io

from rich.console import Console

from sltt_ext import progress as module
from sltt_ext.progress import progress


def ran(console, total=30):
    with progress(total, "demo", "first", console) as steps:
        steps.begin("first")
        for number in range(total):
            steps.end(f"part {number + 1}")
    return console.file.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    lines = ran(Console(file=io.StringIO())).splitlines()
    assert lines == [
        "9/30 after 10 s: part 9",
        "19/30 after 20 s: part 19",
        "29/30 after 30 s: part 29",
    ]


def test_a_quick_command_prints_nothing():
    """So that a mistake is one line."""
    assert ran(Console(file=io.StringIO())) == ""


def test_a_terminal_gets_a_bar_that_goes_away():
    shown = ran(Console(file=io.StringIO(), force_terminal=True, width=80))
    assert "30/30" in shown
    assert "after" not in shown
