"""`sltt demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sltt_ext.cli.arguments import Formatter, add_run_arguments, check_writable, checked_device, positive

__all__ = ["register"]


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="train one network on real images with BPTT, SLTT and SLTT-K, side by side",
        description="Train a small convolutional spiking network on handwritten digits with BPTT, SLTT, SLTT-2 "
        "and SLTT-1, with the same seed and settings. Compare accuracy, time and memory.",
        epilog="examples:\n  sltt demo --quick\n  sltt demo --epochs 5 --output my-results",
        formatter_class=Formatter,
    )
    parser.add_argument("--epochs", type=positive, default=10, help="training epochs of each method")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: a smaller network and two epochs"
    )
    add_run_arguments(parser, seed="seed of weights, batches and drawn steps")
    parser.add_argument(
        "--time-steps",
        type=positive,
        default=6,
        metavar="T",
        help="number of steps for which an image is shown",
    )
    parser.add_argument("--output", type=Path, default=Path("sltt-demo"), help="folder for table and plot")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from sltt_ext.demo import DemoSettings, run_demo
    from sltt_ext.demo.run import FILES

    check_writable("--output", *(options.output / name for name in FILES))
    settings = DemoSettings(
        epochs=options.epochs,
        seed=options.seed,
        time_steps=options.time_steps,
        device=str(checked_device(options.device)),
    )
    run_demo(settings.quick() if options.quick else settings, options.output)
