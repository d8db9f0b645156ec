"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sltt_ext.errors import ConfigurationError
from sltt_ext.methods import COMPARED, method_named

__all__ = [
    "Formatter",
    "add_methods_argument",
    "add_network_arguments",
    "add_run_arguments",
    "check_methods",
    "check_writable",
    "checked_device",
    "positive",
    "size",
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults, and examples with their line breaks."""


def add_network_arguments(
    parser: Any, batch: int, shape: tuple[int, ...] | None, factory: str | None
) -> None:
    """Arguments for the network and its input."""
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        type=_reference,
        nargs="?" if factory else None,
        help="a function without arguments that returns the network, in a module that can be imported from here"
        + (f"; default: {factory}" if factory else ""),
    )
    parser.add_argument(
        "--input-shape",
        type=_shape,
        default=shape,
        metavar="C,H,W",
        help="shape of one sample at one time step, without the batch",
    )
    parser.add_argument(
        "--time-steps",
        type=positive,
        default=6,
        metavar="T",
        help="number of steps for which an input is shown",
    )
    parser.add_argument("--batch", type=positive, default=batch, metavar="N", help="samples in a batch")
    parser.add_argument("--membrane", action="store_true", help="the loss reads the last of the network's outputs (snnTorch)")  # fmt: skip
    add_run_arguments(parser, seed="seed of weights and random inputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_methods_argument(parser: Any) -> None:
    """Add ``--methods``, the methods to compare."""
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), metavar="METHOD", help="the others are compared with the first")  # fmt: skip


def check_methods(names: Sequence[str]) -> None:
    """Check that ``--methods`` names each method once.

    Raises:
        ConfigurationError: If it names one twice.
    """
    if len({method_named(name) for name in names}) < len(names):
        raise ConfigurationError(f"--methods names a method twice: {' '.join(names)}")


def add_run_arguments(parser: Any, seed: str) -> None:
    """Arguments of every command that runs networks: ``--seed`` with its help, and ``--device``."""
    parser.add_argument("--seed", type=_seed, default=0, help=seed)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to run: cpu, cuda, or cuda:1, ...")


def checked_device(name: str) -> torch.device:
    """The device, if it holds numbers and can be measured.

    Raises:
        ConfigurationError: If it does not, or cannot.
    """
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # each device has its own error
        raise ConfigurationError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name}: sltt runs on cpu and cuda devices; choose one of these")
    return device


def check_writable(option: str, *files: Path) -> None:
    """Check that every file can be written, and its folder made if missing. The check leaves nothing behind.

    Raises:
        ConfigurationError: If a file cannot be written. The error names ``option``.
    """
    for file in files:
        made = [path for path in (file, *file.parents) if not os.path.lexists(path)]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("ab").close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"{option}: {file} cannot be written ({reason}): give another path"
            ) from error
        finally:
            for path in made:
                if os.path.isdir(path):
                    path.rmdir()
                elif os.path.lexists(path):
                    path.unlink()


def positive(text: str) -> int:
    """An integer from 1 to a billion."""
    return _integer(text, 1, 10**9)


def size(text: str) -> int:
    """Bytes, such as 8GB, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 8GB, 500MB or 2GiB, got {text[:40]!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _seed(text: str) -> int:
    return _integer(text, -(2**63), 2**64 - 1)  # the range of torch.manual_seed


def _integer(text: str, lowest: int, highest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"must be an integer from {lowest} to {highest}, got {text[:40]!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be positive integers with commas, such as 3,64,64, got {text!r}"
        ) from None


def _reference(text: str) -> tuple[str, str]:
    module, colon, factory = text.partition(":")
    if not (module and colon and factory):
        raise argparse.ArgumentTypeError(f"must be MODULE:FACTORY, such as my_models:build, got {text!r}")
    return module, factory
