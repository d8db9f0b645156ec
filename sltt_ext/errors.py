"""The errors sltt_ext raises, and its warnings. All errors inherit `SLTTError`; each message says what to do."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class SLTTError(Exception):
    """Base class of every error raised on purpose by sltt_ext."""


class SLTTWarning(UserWarning):
    """Something that was asked for works, in a way its user has to know about."""


class SilentLayersWarning(SLTTWarning):
    """Layers whose neurons have not fired in any of the first iterations: what is behind them learns from nothing."""


class ConversionError(SLTTError):
    """A network cannot be converted. Nothing in it has been changed.

    Attributes:
        reasons: Module path -> why that module cannot be converted, and what to use instead.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        super().__init__(listed(message, self.reasons))


class UnsupportedModuleError(SLTTError):
    """Raised by a conversion rule: SLTT cannot train this module. Says why and what to use instead.

    `sltt_ext.convert` collects these into one `ConversionError`.
    """


class DeclarationError(SLTTError):
    """A neuron of one's own is not what it was declared to be."""


class ConfigurationError(SLTTError, ValueError):
    """An option has a value that cannot work, alone or with the network it is used with."""


class InputError(SLTTError, ValueError):
    """Input data of the wrong shape, length or kind."""


class LossError(SLTTError, ValueError):
    """A loss or network output that cannot be back-propagated."""


class BackendError(SLTTError, RuntimeError):
    """A backend was asked for by name and cannot be used."""


class CompilationError(SLTTError, RuntimeError):
    """A network cannot be compiled."""


class CheckpointError(SLTTError, RuntimeError):
    """A checkpoint that cannot be used: damaged, written by something else, or of something else."""


class WriteError(SLTTError, OSError):
    """A file or folder that cannot be written, as the disk is full or read-only; what it would replace is intact."""


class FactoryError(SLTTError):
    """``MODULE:FACTORY``, given to the `sltt` command, does not lead to a network."""


class DataError(SLTTError, RuntimeError):
    """A data set that is absent, incomplete or damaged; the message names the folder or file."""


class MissingDependencyError(SLTTError, ImportError):
    """An optional package is needed and not installed."""


def one_line(error: BaseException, longest: int = 400) -> str:
    """Kind and message of an error of someone else's, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:longest]}"


def is_out_of_memory(error: BaseException) -> bool:
    """On a CUDA device, or on the CPU, where PyTorch has no class for it."""
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
