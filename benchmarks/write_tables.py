"""Bring docs/benchmarks.md and docs/fit.md up to date: their tables, and the plots beside them, from benchmarks/results.

python benchmarks/write_tables.py
"""

from __future__ import annotations

from pathlib import Path

from peers import figures, tables

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    pages()
    figures.draw(DOCS)


def pages() -> None:
    """The tables alone, for which nothing has to be drawn."""
    for name in tables.PAGES:
        page = DOCS / name
        page.write_text(tables.with_tables(page.read_text()))


if __name__ == "__main__":
    main()
