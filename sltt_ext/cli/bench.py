"""`sltt bench`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from sltt_ext.cli.arguments import (
    Formatter,
    add_methods_argument,
    add_network_arguments,
    check_methods,
    check_writable,
    positive,
)
from sltt_ext.files import write_csv
from sltt_ext.optional import require
from sltt_ext.progress import progress

if TYPE_CHECKING:
    from sltt_ext.analysis.timing import Benchmark

__all__ = ["register", "spiking_resnet18"]

_EXAMPLES = """examples:
  sltt bench
  sltt bench --input-shape 3,224,224 --batch 32 --device cuda
  sltt bench my_models:build --input-shape 3,64,64 --time-steps 10 --methods bptt sltt sltt-4 --csv bench.csv"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="time and memory of one training iteration with BPTT, SLTT and SLTT-K on this machine",
        description="Time one training iteration (forward and backward, no update) of every method, in turns. Also "
        "count its peak memory: activations, states, gradients.",
        epilog=_EXAMPLES,
        formatter_class=Formatter,
    )
    add_network_arguments(parser, batch=4, shape=(3, 64, 64), factory="SpikingJelly's spiking_resnet18")
    add_methods_argument(parser)
    parser.add_argument("--repeats", type=positive, default=11, help="how often each method is timed")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table here")
    parser.set_defaults(run=_run)


def spiking_resnet18() -> nn.Module:
    """SpikingJelly's spiking ResNet-18 with 10 classes, LIF neurons and the ATan surrogate."""
    model: Any = require("spikingjelly.activation_based.model.spiking_resnet", extra="spikingjelly")
    framework: Any = require("spikingjelly.activation_based", extra="spikingjelly")
    net: nn.Module = model.spiking_resnet18(
        spiking_neuron=framework.neuron.LIFNode,
        surrogate_function=framework.surrogate.ATan(),
        detach_reset=True,
        num_classes=10,
    )
    return net


def _run(options: argparse.Namespace) -> None:
    from sltt_ext.analysis.timing import benchmark
    from sltt_ext.cli.inputs import network, random_batches, read_output

    check_methods(options.methods)
    if options.csv is not None:
        check_writable("--csv", options.csv)
    options.factory = options.factory or ("sltt_ext.cli.bench", "spiking_resnet18")
    console = require("rich.console", extra="analysis").Console(stderr=options.json)
    with progress(len(options.methods) * (options.repeats + 2), "analysis") as steps:
        steps.begin("runs")
        net = network(options)
        ((x, target),) = random_batches(options, net, 1)
        result = benchmark(
            net,
            x,
            target,
            F.cross_entropy,
            options.time_steps,
            methods=options.methods,
            repeats=options.repeats,
            output=read_output(options),
            on_run=steps.end,
        )
    if options.csv is not None:
        _write(result, options.csv)
    if options.json:
        print(json.dumps(asdict(result)))
        return
    console.print(_table(result, f"{type(net).__name__}, input {list(x.shape)}, T = {options.time_steps}"))


def _table(result: Benchmark, title: str) -> Any:
    caption = f"medians of {result.repeats} runs in turns, on {result.device}"
    table = require("rich.table", extra="analysis").Table(title=title, caption=caption)
    table.add_column("method")
    for heading in ("seconds", "fastest - slowest", "relative", "peak MB", "relative"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.method,
            f"{row.seconds:.4f}",
            f"{row.fastest_seconds:.4f} - {row.slowest_seconds:.4f}",
            f"{row.relative_seconds:.2f}",
            f"{row.peak_bytes / 1e6:.1f}",
            f"{row.relative_bytes:.2f}",
        )
    return table


def _write(result: Benchmark, path: Path) -> None:
    common = {"time_steps": result.time_steps, "repeats": result.repeats, "device": result.device}
    write_csv(path, [{**asdict(row), **common} for row in result.rows])
