"""Bring the tables and plots of README.md and of the documentation up to date, from benchmarks/results.

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
    """Bring the tables up to date, without the plots."""
    for name in tables.PAGES:
        page = ROOT / name
        page.write_text(tables.with_tables(page.read_text()))


if __name__ == "__main__":
    main()
