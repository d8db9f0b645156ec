"""Modules that return the same whenever they are called with the same tensors.

Nothing of an earlier call, no random number and no side effect enters their output, so that what does not
depend on time may be evaluated once for all time steps. Torch's own layers are known, a framework's room
registers its layers, and any other module says so itself with the attribute ``sltt_time_invariant = True``
(or False, to be evaluated at every step). One that folds the axis of time into the batch says that, too, with
``sltt_folds_time = True``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize

__all__ = [
    "is_average_pooling",
    "is_batch_norm",
    "is_counting_batch_norm",
    "is_stateless",
    "register_stateless",
]

_DIMENSIONS = ("1d", "2d", "3d")

_STATELESS: set[type[nn.Module]] = {
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
_STATELESS |= {getattr(nn, kind + dimension) for kind in _BY_DIMENSION for dimension in _DIMENSIONS}
_CONTAINERS: set[type[nn.Module]] = {nn.Sequential}
_BATCH_NORMS: set[type[nn.Module]] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def register_stateless(*classes: type[nn.Module]) -> None:
    """Add layers of a framework; those that also are one of torch's containers or batch norms are known as such."""
    for cls in classes:
        if issubclass(cls, tuple(_CONTAINERS)):
            _CONTAINERS.add(cls)
        elif issubclass(cls, tuple(_BATCH_NORMS)):
            _BATCH_NORMS.add(cls)
        else:
            _STATELESS.add(cls)


def is_stateless(module: nn.Module) -> bool:
    """Whether ``module`` returns the same whenever it is called with the same tensors.

    A batch norm in training is not: its running statistics count the calls. Nor is a module with a hook before its
    forward, which may change it: pruning and the older weight norms compute the weight there.
    """
    declared = getattr(module, "sltt_time_invariant", None)
    if declared is not None:
        return bool(declared)
    cls = parametrize.type_before_parametrizations(module)
    if getattr(module, "inplace", False) or not _has_fixed_weights(module):
        return False
    if cls in _CONTAINERS or cls is parametrize.ParametrizationList:
        return len(list(module.children())) > 0 and all(map(_is_plain, module.children()))
    return cls in _STATELESS or (cls in _BATCH_NORMS and not module.training)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm, of torch or of a framework, without rules of its own."""
    return parametrize.type_before_parametrizations(module) in _BATCH_NORMS


def is_counting_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm in training that is stateless but for its running statistics."""
    averages = getattr(module, "momentum", None) is not None or not getattr(
        module, "track_running_stats", True
    )
    return is_batch_norm(module) and module.training and averages and _has_fixed_weights(module)


def is_average_pooling(module: nn.Module) -> bool:
    """Whether ``module`` is an average pooling without rules of its own: its backward reads the input's shape alone."""
    averages = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    return isinstance(module, averages) and type(module) in _STATELESS


def _has_fixed_weights(module: nn.Module) -> bool:
    lists: Any = module.parametrizations.values() if parametrize.is_parametrized(module) else ()  # type: ignore[operator]
    return not module._forward_pre_hooks and all(map(is_stateless, lists))


def _is_plain(module: nn.Module) -> bool:
    """Whether it shows nowhere that a stateless module ran only once."""
    return is_stateless(module) and not (module._forward_hooks or module._forward_pre_hooks)
