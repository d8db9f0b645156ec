"""`sltt plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from sltt_ext.cli.arguments import (
    Formatter,
    add_methods_argument,
    add_network_arguments,
    check_methods,
    positive,
)
from sltt_ext.online import options as checked
from sltt_ext.optional import require

if TYPE_CHECKING:
    from sltt_ext.analysis.plans import Plans

__all__ = ["register"]

_EXAMPLES = """examples:
  sltt plan my_models:build --input-shape 3,64,64 --time-steps 6
  sltt plan my_models:build --input-shape 3,224,224 --batch 32 --device cuda --memory-budget 10GiB
  sltt plan my_models:build --input-shape 3,64,64 --methods bptt sltt sltt-2 --json

The network is built by calling FACTORY without arguments. The loss is the cross-entropy of the output of each step."""


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="how much you will save: memory and time of the plans for your network, and which one the trainer takes",
        description="Run a few training iterations (forward and backward, no update) of your network with every plan that the "
        "trainer tries. Print the memory and the time of each plan and of BPTT.",
        epilog=_EXAMPLES,
        formatter_class=Formatter,
    )
    add_network_arguments(parser, batch=8, shape=None, factory=None)
    add_methods_argument(parser)
    parser.add_argument("--memory-budget", metavar="SIZE", help="memory that a plan may need: 6GiB, a part of the device's memory such as 0.8, or least; default: the leanest plan that is about as fast as the fastest")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5, help="how often each plan is timed")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    console = require("rich.console", extra="analysis").Console(stderr=options.json)
    from sltt_ext.analysis.plans import plans
    from sltt_ext.cli.inputs import network, random_batches, read_output

    check_methods(options.methods)
    budget = checked.budget(options.memory_budget, "auto")
    with require("rich.progress", extra="analysis").Progress(console=console, transient=True) as progress:
        task = progress.add_task("network", total=None)
        net = network(options)
        ((x, target),) = random_batches(options, net, 1)
        result = plans(
            net,
            x,
            target,
            F.cross_entropy,
            options.time_steps,
            methods=options.methods,
            memory_budget=budget,
            repeats=options.repeats,
            output=read_output(options),
            on_progress=lambda what: progress.update(task, description=what, advance=1),
        )
    if options.json:
        print(json.dumps(asdict(result)))
        return
    console.print(_table(result, f"{type(net).__name__}, input {list(x.shape)}, T = {options.time_steps}"))


def _table(result: Plans, title: str) -> Any:
    caption = f"medians of {result.repeats} runs in turns, on {result.device}; * is what OnlineTrainer takes"
    table = require("rich.table", extra="analysis").Table(title=title, caption=caption)
    table.add_column("method")
    table.add_column("plan")
    for heading in ("seconds", "relative", "peak MB", "relative"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.method,
            row.plan + " *" * row.is_taken,
            f"{row.seconds:.4f}",
            f"{row.relative_seconds:.2f}",
            f"{row.peak_bytes / 1e6:.1f}",
            f"{row.relative_bytes:.2f}",
            style="bold" if row.is_taken else None,
        )
    return table
