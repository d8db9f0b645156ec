"""Time-invariant modules: they return the same whenever they are called with the same tensors.

No number of an earlier call, no random number and no side effect enters their output. So where their input does not
change over time, one evaluation does for all time steps. Torch's own layers are known, and a framework's room
registers its layers. Any other module says it with the attribute ``sltt_time_invariant = True``, or False to be
evaluated at every step. A module that folds the axis of time into the batch says ``sltt_folds_time = True``, and so does
a norm, or a network, that reads it folded.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sltt_ext.forwards import has_global_hooks, has_hooks, has_own_forward

__all__ = [
    "Time",
    "folds_time",
    "is_average_pooling",
    "is_batch_norm",
    "is_counting_batch_norm",
    "is_time_invariant",
    "register_folding",
    "register_time_invariant",
    "time_after",
]


class Time(Enum):
    """Where a tensor that several steps share has its time."""

    NONE = "none"
    """It is ``[N, ...]``, and a call reads it as it is: a single step."""
    AXIS = "axis"
    """It is ``[1, N, ...]``, and a call of C steps reads ``[C, N, ...]``."""
    BATCH = "batch"
    """It is ``[N, ...]``, and a call of C steps reads ``[C * N, ...]``."""


_DIMENSIONS = ("1d", "2d", "3d")

_INVARIANT: set[type[nn.Module]] = {
    nn.Linear, nn.Bilinear, nn.Flatten, nn.Unflatten, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d,
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
    parametrizations._WeightNorm,
}  # fmt: skip
_BY_DIMENSION = [
    "Conv",
    "ConvTranspose",
    "AvgPool",
    "MaxPool",
    "LPPool",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
]
_BY_DIMENSION += ["ConstantPad", "ReflectionPad", "ReplicationPad", "ZeroPad", "CircularPad"]
_INVARIANT |= {getattr(nn, kind + dimension) for kind in _BY_DIMENSION for dimension in _DIMENSIONS}
_CONTAINERS: set[type[nn.Module]] = {nn.Sequential}
_FOLDING: set[type[nn.Module]] = set()
_BATCH_NORMS: set[type[nn.Module]] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def register_time_invariant(*classes: type[nn.Module]) -> None:
    """Add layers of a framework; those that also are one of torch's containers or batch norms are known as such."""
    for cls in classes:
        if issubclass(cls, tuple(_CONTAINERS)):
            _CONTAINERS.add(cls)
        elif issubclass(cls, tuple(_BATCH_NORMS)):
            _BATCH_NORMS.add(cls)
        else:
            _INVARIANT.add(cls)


def register_folding(*classes: type[nn.Module]) -> None:
    """Add containers of a framework whose modules read ``[T * N, ...]``, time folded into the batch."""
    _FOLDING.update(classes)


def folds_time(module: nn.Module) -> bool:
    """Whether ``module``, and what is in it, reads time folded into the batch, the samples of the first step first."""
    return type(module) in _FOLDING or bool(getattr(module, "sltt_folds_time", False))


def is_time_invariant(module: nn.Module) -> bool:
    """Whether ``module`` returns the same whenever it is called with the same tensors.

    A batch norm in training does not: its running statistics count the calls. Nor does a module with a hook before
    its forward, which may change it: pruning and the older weight norms compute the weight there.
    """
    declared = getattr(module, "sltt_time_invariant", None)
    if declared is not None:
        return bool(declared)
    cls = parametrize.type_before_parametrizations(module)
    if getattr(module, "inplace", False) or not _has_fixed_weights(module):
        return False
    if cls in _CONTAINERS or cls is parametrize.ParametrizationList:
        return len(list(module.children())) > 0 and all(map(_is_plain, module.children()))
    return cls in _INVARIANT or (cls in _BATCH_NORMS and not module.training)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm, of torch or of a framework, without rules of its own."""
    return parametrize.type_before_parametrizations(module) in _BATCH_NORMS


def is_counting_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm in training that is time-invariant but for its running statistics."""
    averages = getattr(module, "momentum", None) is not None or not getattr(
        module, "track_running_stats", True
    )
    return is_batch_norm(module) and module.training and averages and _has_fixed_weights(module)


def time_after(module: nn.Module, x: Tensor, time: Time) -> Time | None:
    """Where the output of ``module`` for ``x`` has its time, if ``x`` has it in ``time``; None where nobody can tell.

    A layer that takes sequences keeps the axis of time. So does any other layer, as long as the first dimension is the
    one that it treats as the batch.
    """
    if time is Time.NONE:
        return time
    if getattr(module, "sltt_folds_time", False):
        return Time.BATCH if time is Time.AXIS else None
    if any(map(_moves_the_first_dimension, module.modules())):
        return None
    if time is Time.BATCH or getattr(module, "step_mode", None) == "m" or _reads_batches(module, x):
        return time
    return None


def _reads_batches(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer that takes no sequences treats the first dimension of ``x`` as a batch."""
    if is_counting_batch_norm(module):
        return False  # it would take its statistics over all steps
    if type(module) is nn.Sequential:  # what its layers read is not known
        return all(_dimensions(child) is None for child in module.modules())
    return _dimensions(module) in (None, x.dim() - 2)


def _moves_the_first_dimension(module: nn.Module) -> bool:
    if isinstance(module, nn.Flatten):
        return module.start_dim <= 0
    return isinstance(module, nn.Unflatten) and (isinstance(module.dim, str) or module.dim <= 0)


def _dimensions(module: nn.Module) -> int | None:
    """How many dimensions a convolution or pooling that takes no sequences moves its window over."""
    name = type(module).__name__
    if name[-2:] not in _DIMENSIONS or is_batch_norm(module) or getattr(module, "step_mode", None) == "m":
        return None
    return int(name[-2])


def is_average_pooling(module: nn.Module) -> bool:
    """Whether ``module`` is an average pooling without rules of its own: its backward reads the input's shape alone."""
    averages = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    return isinstance(module, averages) and type(module) in _INVARIANT


def _has_fixed_weights(module: nn.Module) -> bool:
    lists: Any = module.parametrizations.values() if parametrize.is_parametrized(module) else ()  # type: ignore[operator]
    return not module._forward_pre_hooks and all(map(is_time_invariant, lists))


def _is_plain(module: nn.Module) -> bool:
    """Whether it shows nowhere that a time-invariant module ran only once."""
    seen = has_hooks(module) or has_global_hooks() or has_own_forward(module)
    return is_time_invariant(module) and not seen
