"""Bring docs/benchmarks.md, docs/fit.md and docs/reproduce.md up to date: tables and plots, from benchmarks/results.

python benchmarks/write_tables.py
"""

from __future__ import annotations

from pathlib import Path

from peers import figures, tables

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    for name in tables.PAGES:
        page = DOCS / name
        page.write_text(tables.with_tables(page.read_text()))
    figures.draw(DOCS)


if __name__ == "__main__":
    main()
