"""Optional packages: imported where they are needed, with one clear error where they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from sltt_ext.errors import MissingDependencyError

__all__ = ["require", "require_all"]


def require(module: str, extra: str) -> Any:
    """Import ``module``, or say which extra of sltt-ext brings it.

    Raises:
        MissingDependencyError: If the package of ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingDependencyError(
            f"{error.name} is not installed: pip install 'sltt-ext[{extra}]'", name=error.name
        ) from error


def require_all(modules: Sequence[str], extra: str) -> None:
    """Import all ``modules``, or name all that are missing at once, with the extra that brings them.

    Raises:
        MissingDependencyError: If the package of one is not installed.
    """
    missing: list[MissingDependencyError] = []
    for module in modules:
        try:
            require(module, extra)
        except MissingDependencyError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        *names, last = (str(error.name) for error in missing)
        raise MissingDependencyError(
            f"{', '.join(names)} and {last} are not installed: pip install 'sltt-ext[{extra}]'", name=names[0]
        )
