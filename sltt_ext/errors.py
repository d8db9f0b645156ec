"""The errors and warnings of sltt_ext. All errors inherit `SLTTError`; each message says what to do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping

import torch


class SLTTError(Exception):
    """Base class of every error raised on purpose by sltt_ext."""


class SLTTWarning(UserWarning):
    """Something works, but in a way that its user has to know about."""


class SilentLayersWarning(SLTTWarning):
    """Some layers have not fired in any of the first iterations, so the weights behind them do not learn."""


class ConversionError(SLTTError):
    """A network cannot be converted. Nothing in it has been changed.

    Attributes:
        reasons: Module path -> why that module cannot be converted, and what to use instead.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        super().__init__(listed(message, self.reasons))


class UnsupportedModuleError(SLTTError):
    """A conversion rule raises it where SLTT cannot train a module. It says why, and what to use instead.

    `sltt_ext.convert` collects these into one `ConversionError`.
    """


class DeclarationError(SLTTError):
    """A neuron that was declared with `declare_neuron` does not do what the declaration says."""


class ConfigurationError(SLTTError, ValueError):
    """An option has a value that cannot work, either at all or with this network."""


class InputError(SLTTError, ValueError):
    """The input data has the wrong shape, length or kind."""


class LossError(SLTTError, ValueError):
    """A loss or a network output cannot be back-propagated."""


class BackendError(SLTTError, RuntimeError):
    """A backend was asked for by name and cannot be used."""


class CompilationError(SLTTError, RuntimeError):
    """A network cannot be compiled."""


class CheckpointError(SLTTError, RuntimeError):
    """A checkpoint cannot be used: it is damaged, another program wrote it, or it is from another run."""


class WriteError(SLTTError, OSError):
    """A file or folder cannot be written, for example because the disk is full. What it would replace is intact."""


class FactoryError(SLTTError):
    """``MODULE:FACTORY``, given to the `sltt` command, does not lead to a network."""


class DataError(SLTTError, RuntimeError):
    """A data set is absent, incomplete or damaged. The message names the folder or file."""


class MissingDependencyError(SLTTError, ImportError):
    """An optional package is needed, but it is not installed."""


def one_line(error: BaseException, longest: int = 400) -> str:
    """The class and the message of an error from another library, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:longest]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a CUDA device or on the CPU, for which PyTorch has no error class."""
    said = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in said
        or "size calculation overflowed" in said
    )


def listed(message: str, reasons: Mapping[str, str]) -> str:
    """A message with one line for each module path and its reason."""
    lines = [f"  {path or '(the module itself)'}: {reason}" for path, reason in reasons.items()]
    return "\n".join([message, *lines])


def warn(message: str, category: type[SLTTWarning] = SLTTWarning) -> None:
    """Warn at the line that has called this package, whatever of torch or of this package lies in between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_INNER = ("sltt_ext", "torch", "contextlib")  # not the code whose warning it is
