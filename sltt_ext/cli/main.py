"""Reads the command line, runs a command, and turns errors into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import sltt_ext
from sltt_ext.cli import analyze, bench, demo, env, plan
from sltt_ext.errors import ConfigurationError, SLTTError, is_out_of_memory, one_line

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code: 0 done, 1 an error (printed on standard error), 2 wrong usage, 130 stopped with Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="sltt",
        description="Spatial Learning Through Time for spiking neural networks.",
        epilog="Exit codes: 0 done, 1 an error (printed on standard error), 2 wrong usage, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"sltt-ext {sltt_ext.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, env, analyze, bench, plan):
        command.register(commands)
    for command_parser in commands.choices.values():
        command_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = argparse.Namespace(debug=False)
    try:
        try:
            parser.parse_args(arguments, options)
            options.run(options)
        finally:
            sys.stdout.flush()  # the reader gets help and version, too
    except KeyboardInterrupt:
        print("sltt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"sltt: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, SLTTError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: use a smaller --batch or fewer --time-steps"
    return f"{one_line(error)}; --debug shows where it comes from"
