"""How far a command is: a live bar in a terminal, and a line now and then where output goes into a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sltt_ext.optional import require

__all__ = ["Lines", "Steps", "progress"]

SECONDS_BETWEEN_LINES = 10.0


class Lines:
    """Prints how far something is, every ten seconds at most.

    Args:
        console: A ``rich.console.Console``.
        at_once: Whether the first line is printed without waiting.
    """

    def __init__(self, console: Any, at_once: bool = False) -> None:
        self._console = console
        self._start = time.monotonic()
        self._latest = -SECONDS_BETWEEN_LINES if at_once else 0.0
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps are over, and ``what`` runs now or was last; empty: as before."""
        self._what = what or self._what
        elapsed = time.monotonic() - self._start
        if elapsed - self._latest >= SECONDS_BETWEEN_LINES:
            self._latest = elapsed
            self._console.print(
                f"{done}/{total} after {elapsed:.0f} s: {self._what}", highlight=False, soft_wrap=True
            )


class Steps:
    """So many steps, one after the other.

    Args:
        total: How many.
        show: Called with what runs, the number of finished steps and ``total``.
    """

    def __init__(self, total: int, show: Any) -> None:
        self.total = total
        self.done = 0
        self._show = show

    def begin(self, what: str) -> None:
        """Say what runs now."""
        self._show(what, self.done, self.total)

    def end(self, what: str = "") -> None:
        """One step is over."""
        self.done += 1
        self._show(what, self.done, self.total)


@contextmanager
def progress(total: int, extra: str, what: str = "", console: Any = None) -> Iterator[Steps]:
    """Show steps while they are made.

    Args:
        total: How many there are.
        extra: Which extra brings rich.
        what: What runs first.
        console: A ``rich.console.Console``; default is one on standard error, so that results alone are on standard output.
    """
    console = console or require("rich.console", extra=extra).Console(stderr=True)
    if not console.is_terminal:
        yield Steps(total, Lines(console))
        return
    bars = require("rich.progress", extra=extra)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=total)

        def show(what: str, done: int, total: int) -> None:
            shown.update(task, completed=done, **({"description": what} if what else {}))

        yield Steps(total, show)
