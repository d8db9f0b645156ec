"""`sltt analyze`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from sltt_ext.cli.arguments import Formatter, add_network_arguments, check_writable, positive, size
from sltt_ext.errors import ConfigurationError
from sltt_ext.optional import require, require_all
from sltt_ext.progress import progress

if TYPE_CHECKING:
    from sltt_ext.analysis.analyze import Analysis

__all__ = ["register"]

_PARTS = 9
_RANDOM = (
    "The inputs are random numbers from 0 to 1 and the targets are random classes. Firing rates and "
    "gradients differ with real data: give it with --data."
)
_EXAMPLES = """examples:
  sltt analyze my_models:build --input-shape 3,64,64 --time-steps 6
  sltt analyze my_models:build --data batch.pt --time-steps 10 --time-dim 0   # torch.save((x, target), "batch.pt")
  sltt analyze my_models:build --input-shape 3,224,224 --batch 32 --bptt-max-memory 8GB --json

The network is built by calling FACTORY without arguments. The loss is the cross-entropy of the output of each step."""


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "analyze",
        help="one report of what SLTT does to your network: gradients, memory, operations, firing rates",
        description="Compare SLTT with BPTT on your network: how close the gradients are, also with a gradient "
        "through a few time steps; memory over time steps and by layer; scalar operations; firing rates. Writes report.html and report.json.",
        epilog=_EXAMPLES,
        formatter_class=Formatter,
    )
    add_network_arguments(parser, batch=4, shape=None, factory=None)
    parser.add_argument("--classes", type=positive, help="classes of random targets; default: the network's outputs")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FILE.pt", help="file with a pair (x, target) saved by torch.save, instead of random numbers")  # fmt: skip
    parser.add_argument("--time-dim", type=int, choices=(0, 1), help="the axis of time in x of --data; default: the same x at every step")  # fmt: skip
    parser.add_argument("--batches", type=positive, default=2, help="batches for the gradient similarity")
    parser.add_argument("--bptt-max-memory", type=size, metavar="SIZE", help="memory that BPTT may take, e.g. 8GB; default: 80%% of the free memory")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("sltt-analysis"), help="folder of the report")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    require_all(("matplotlib", "jinja2", "rich"), extra="analysis")  # before the work, not after it
    from sltt_ext.analysis.analyze import analyze
    from sltt_ext.analysis.report import FILES, save_report
    from sltt_ext.cli.inputs import network, random_batches, read_output, saved_batches

    check_writable("--output", *(options.output / name for name in FILES))
    if options.time_dim is not None and options.data is None:
        raise ConfigurationError("--time-dim is an axis of x in --data: give --data FILE.pt, or leave it out")
    console = require("rich.console", extra="analysis").Console(stderr=options.json)
    with progress(_PARTS + 1, "analysis") as steps:
        steps.begin("network")
        net = network(options)
        if options.data is None:
            batches = random_batches(options, net, options.batches, options.classes)
        else:
            batches = saved_batches(options.data, options, net, options.batches)
        (x, target), *more = batches
        analysis = analyze(
            net,
            x,
            target,
            F.cross_entropy,
            options.time_steps,
            more_batches=more,
            max_memory=options.bptt_max_memory,
            time_dim=options.time_dim,
            output=read_output(options),
            on_progress=steps.end,
            notes=[_RANDOM] * (options.data is None),
        )
    page, numbers = save_report(analysis, options.output)
    if options.json:
        print(json.dumps(analysis.to_json(), allow_nan=False))
        return
    _print(analysis, console)
    console.print(f"Saved: {page}, {numbers}", highlight=False, soft_wrap=True)


def _print(analysis: Analysis, console: Any) -> None:
    from sltt_ext.analysis.report import headline
    from sltt_ext.analysis.verdict import cautions, verdict

    console.print(" ".join(verdict(analysis)), style="bold", highlight=False, markup=False)
    table = require("rich.table", extra="analysis").Table(title=analysis.about["network"], show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for value, text in headline(analysis):
        table.add_row(value, text)
    console.print(table)
    for text in [*cautions(analysis), *analysis.notes]:
        console.print(f"Note: {text}", highlight=False, markup=False)
