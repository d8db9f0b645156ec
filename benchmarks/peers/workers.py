"""Cells measured in a process of their own: one that crashes, or takes too long, is a row and not the end."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

__all__ = ["Measurable", "rows_of"]

Row = dict[str, Any]
STARTING = 120.0
"""Seconds that a process has to import everything."""


class Measurable(Protocol):
    """What the parent knows of a cell."""

    limit: float
    environment: Sequence[tuple[str, str]]

    def row(self, status: str = "") -> Row:
        """A row without figures."""
        ...


def rows_of(
    cells: Sequence[Any], measure: Callable[[Any], Row], left: Callable[[], float]
) -> Iterator[tuple[Any, Row]]:
    """Measure cells one after the other, each with its row as soon as it is there.

    Args:
        cells: In order; see `Measurable`.
        measure: A function of a module, called in the other process.
        left: Seconds that are left for all; no cell begins after that, and one that has begun ends.
    """
    worker: _Worker | None = None
    try:
        for cell in cells:
            if left() <= 0:
                return
            if worker is None or worker.environment != dict(cell.environment):
                if worker is not None:
                    worker.end()
                worker = _Worker(measure, dict(cell.environment))
            row = worker.row_of(cell, left())
            if not worker.alive:
                worker = None
            if row is None:  # cut short by the time for all: not the cell's fault
                return
            yield cell, row
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that measures cells.

    Args:
        measure: What it calls.
        environment: Variables that are set for it.
    """

    def __init__(self, measure: Callable[[Any], Row], environment: dict[str, str]) -> None:
        self.environment = environment
        self.alive = True
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process = context.Process(target=_measure_all, args=(other, measure), daemon=True)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()
        self._ready = False

    def row_of(self, cell: Any, left: float) -> Row | None:
        """The cell's row; None where the time that is ``left`` ends before its own limit.

        Raises:
            RuntimeError: If the process cannot even start.
        """
        start = time.monotonic()
        if not self._ready:
            self._ready = self._wait_for_start(min(left, STARTING))
            if not self._ready:
                self.end()
                return None
        limit = min(cell.limit, left - (time.monotonic() - start))
        try:
            self._connection.send(cell)
            if not self._connection.poll(max(limit, 0)):
                self.end()
                return cell.row(f"over its limit of {cell.limit:g} s") if limit == cell.limit else None  # type: ignore[no-any-return]
            row = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.end()
            return cell.row(f"failed: its process ended with {code}")  # type: ignore[no-any-return]
        if "CUDA error" in str(row.get("status", "")):
            self.end()  # nothing runs in that process any more
        return row  # type: ignore[no-any-return]

    def _wait_for_start(self, seconds: float) -> bool:
        try:
            if not self._connection.poll(max(seconds, 0)):
                return False
            self._connection.recv()
            return True
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise RuntimeError("the process that measures could not start: its error is above") from error

    def end(self) -> None:
        """Stop the process."""
        self.alive = False
        self._connection.close()
        self._process.kill()
        self._process.join()


def _measure_all(connection: Connection, measure: Callable[[Any], Row]) -> None:
    connection.send(None)  # everything is imported
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        connection.send(measure(cell))
