"""`sltt env`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sltt_ext.cli.arguments import Formatter

__all__ = ["register"]


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "env",
        help="versions, devices, and the backend that runs the neurons on each",
        description="Print what a bug report needs: versions, devices, which backend runs the fused neurons on "
        "each, and why the others do not.",
        epilog="example: sltt env --json",
        formatter_class=Formatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from sltt_ext.environment import environment

    report = environment()
    if options.json:
        print(json.dumps(report, indent=2))
        return
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")
