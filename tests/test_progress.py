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
        "0/30 after 1 s: first",
        "10/30 after 11 s: part 10",
        "20/30 after 21 s: part 20",
        "30/30 after 31 s: part 30",
    ]


def test_a_quick_command_prints_one_line():
    assert ran(Console(file=io.StringIO())).splitlines() == ["0/30 after 0 s: first"]


def test_a_terminal_gets_a_bar_that_goes_away():
    shown = ran(Console(file=io.StringIO(), force_terminal=True, width=80))
    assert "30/30" in shown
    assert "after" not in shown
