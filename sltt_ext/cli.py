"""The `sltt` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import sltt_ext
from sltt_ext.errors import SLTTError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 an error (said on standard error), 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="sltt", description="Spatial Learning Through Time for spiking neural networks."
    )
    parser.add_argument("--version", action="version", version=f"sltt-ext {sltt_ext.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train one network on real images with BPTT, SLTT and SLTT-K, side by side",
        description="Train a small convolutional spiking network on handwritten digits with BPTT, SLTT, SLTT-2 "
        "and SLTT-1, with the same seed and settings, and compare accuracy, time and memory.",
        epilog="example: sltt demo --epochs 5 --output my-results",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_positive, default=10, help="training epochs of each method")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, batches and drawn steps")
    demo.add_argument("--time-steps", type=_positive, default=6, metavar="T", help="steps an image is shown")
    demo.add_argument("--output", type=Path, default=Path("sltt-demo"), help="folder for table and plot")
    demo.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to train on"
    )
    env = commands.add_parser(
        "env",
        help="versions, devices, and the backend that runs the neurons on each",
        description="Print what a bug report needs: versions, devices, which backend runs the fused neurons on "
        "each, and why not another.",
    )
    env.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_args(arguments)
    if options.command == "env":
        _print_environment(as_json=options.json)
        return 0
    try:
        from sltt_ext.demo import DemoSettings, run_demo

        settings = DemoSettings(
            epochs=options.epochs, seed=options.seed, time_steps=options.time_steps, device=options.device
        )
        run_demo(settings, options.output)
    except SLTTError as error:
        print(f"sltt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sltt: stopped", file=sys.stderr)
        return 130
    return 0


def _print_environment(as_json: bool) -> None:
    from sltt_ext.environment import environment

    report = environment()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
