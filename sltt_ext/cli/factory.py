"""The user's network, from the name of the function that builds it."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from sltt_ext.errors import FactoryError, one_line

__all__ = ["build"]


def build(reference: tuple[str, str]) -> nn.Module:
    """The network that ``(module, factory)`` builds. The working directory is searched first.

    Raises:
        FactoryError: If the module cannot be imported, or if the factory does not exist, needs arguments, fails or
            returns something else.
    """
    module_name, name = reference
    factory = _attribute(_imported(module_name), module_name, name)
    written = f"{module_name}:{name}"
    if not callable(factory):
        raise FactoryError(f"{written} is a {type(factory).__name__}, not a function that builds a network")
    if isinstance(factory, nn.Module):
        raise FactoryError(
            f"{written} is a network: name a function that returns it, def build(): return {name}"
        )
    _check_arguments(factory, written)
    try:
        net = factory()
    except (Exception, SystemExit) as error:  # whatever the user's code raises; scripts like to exit
        raise FactoryError(f"{written} raised {one_line(error)}; --debug shows where") from error
    if not isinstance(net, nn.Module):
        raise FactoryError(f"{written} returned a {type(net).__name__}, not a torch.nn.Module")
    return net


def _imported(name: str) -> Any:
    if name.endswith(".py") or "/" in name:
        raise FactoryError(
            f"{name!r} is a file: name the module, {Path(name).stem}, and run sltt in its folder"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise FactoryError(f"there is no module {missing!r} in {folder} or on Python's path") from error
        raise FactoryError(f"importing {name} raised {one_line(error)}; --debug shows where") from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises; scripts like to exit
        raise FactoryError(f"importing {name} raised {one_line(error)}; --debug shows where") from error


def _attribute(module: Any, module_name: str, name: str) -> Any:
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        known = f"it has {', '.join(sorted(functions)[:20])}" if functions else "it has no functions"
        raise FactoryError(f"{module_name} has no {name!r}: {known}")
    return getattr(module, name)


def _check_arguments(factory: Any, written: str) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in functions have none
        return
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise FactoryError(
            f"{written} needs arguments: {', '.join(needed)}. Name a function that needs none, e.g. "
            f"def build(): return {written.partition(':')[2]}({needed[0]}=...)"
        )
