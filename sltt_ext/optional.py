"""Optional packages: imported where they are needed, with one clear error where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from sltt_ext.errors import MissingDependencyError

__all__ = ["require"]


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
