"""Bring README.md and pages of the documentation up to date: their tables and plots, from benchmarks/results.

python benchmarks/write_tables.py
"""

from __future__ import annotations

from pathlib import Path

from peers import figures, tables

ROOT = Path(__file__).parents[1]


def main() -> None:
    pages()
    figures.draw(ROOT / "docs")


def pages() -> None:
    """The tables alone, for which nothing has to be drawn."""
    for name in tables.PAGES:
        page = ROOT / name
        page.write_text(tables.with_tables(page.read_text()))


if __name__ == "__main__":
    main()
