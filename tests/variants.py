"""The variants of the CUDA kernels."""

import functools
import itertools

import torch

from sltt_ext.kernels import cuda_leaky, cuda_lif
from sltt_ext.kernels.source import SCALARS, Kernel
from sltt_ext.surrogate import SURROGATES

DTYPES = tuple(SCALARS)
RESETS = (("subtract", False), ("subtract", True), ("zero", False), ("zero", True), ("none", False))
CHARGES = range(7)
LEARNABLE_CHARGES = (3, 4, 6)
BOTH = (False, True)


def widths(dtype: torch.dtype) -> list[int]:
    """All widths of a load, the widest first."""
    return [width for width in (8, 4, 2, 1) if width * dtype.itemsize <= 16]


def lif_kernels(dtype: torch.dtype, width: int, surrogate: str) -> list[Kernel]:
    """All choices with a given surrogate."""
    forward = _forward_lif_kernels(dtype, width, surrogate, cuda_lif.DERIVATIVES)
    backward = [
        cuda_lif.backward_kernel(dtype, width, surrogate, *choices)
        for choices in itertools.product(BOTH, BOTH, BOTH)
    ]
    return forward + backward


def lif_kernels_without_surrogate(dtype: torch.dtype, width: int) -> list[Kernel]:
    """All choices where no gradient is asked for, or one through time."""
    return [
        *_forward_lif_kernels(dtype, width, "sigmoid", cuda_lif.NOTHING),
        *_forward_lif_kernels(dtype, width, "sigmoid", cuda_lif.POTENTIALS),
    ]


def _forward_lif_kernels(dtype: torch.dtype, width: int, surrogate: str, saved: int) -> list[Kernel]:
    return [
        cuda_lif.forward_kernel(dtype, width, surrogate, charge, soft_reset, saved, save_slopes)
        for charge, soft_reset, save_slopes in itertools.product(CHARGES, BOTH, BOTH)
        if not save_slopes or (charge in LEARNABLE_CHARGES and saved)
    ]


def leaky_kernels(dtype: torch.dtype, width: int, surrogate: str) -> list[Kernel]:
    """All choices of backward with a given surrogate."""
    return [
        cuda_leaky.backward_kernel(dtype, width, surrogate, *reset, reduce, through_time)
        for reset, reduce, through_time in itertools.product(RESETS, BOTH, BOTH)
    ]


def leaky_kernels_without_surrogate(dtype: torch.dtype, width: int) -> list[Kernel]:
    """All choices of forward."""
    return [cuda_leaky.forward_kernel(dtype, width, *reset) for reset in RESETS]


@functools.cache
def groups() -> dict[str, list[Kernel]]:
    """Every choice with each surrogate at full width, and with one of them at the others.

    Only snnTorch's Leaky, whose surrogate is computed in float32 alike for every dtype, has them all in float32.
    """
    named = {}
    for dtype in DTYPES:
        for width in widths(dtype):
            at = f"{str(dtype)[6:]}-{width}"
            named[f"{at}-inference"] = lif_kernels_without_surrogate(dtype, width)
            for surrogate in SURROGATES if width == widths(dtype)[0] else ["atan"]:
                named[f"{at}-{surrogate}"] = lif_kernels(dtype, width, surrogate)
        for width in (4, 2, 1):
            at = f"leaky-{str(dtype)[6:]}-{width}"
            named[f"{at}-forward"] = leaky_kernels_without_surrogate(dtype, width)
            for surrogate in SURROGATES if (dtype, width) == (torch.float32, 4) else ["atan"]:
                named[f"{at}-{surrogate}"] = leaky_kernels(dtype, width, surrogate)
    return named


def selection() -> list[Kernel]:
    """Every dtype, every choice and every surrogate, not in all their combinations."""
    kernels = []
    for k, dtype in enumerate(DTYPES):
        width = widths(dtype)[0]
        kernels += (lif_kernels_without_surrogate(dtype, width) + lif_kernels(dtype, width, "sigmoid"))[k::3]
        kernels += leaky_kernels_without_surrogate(dtype, 4) + leaky_kernels(dtype, 4, "atan")[k::3]
    for surrogate in SURROGATES:
        kernels += (
            lif_kernels(torch.float32, 4, surrogate)[::9] + leaky_kernels(torch.float32, 4, surrogate)[3:4]
        )
    return list(dict.fromkeys(kernels))
