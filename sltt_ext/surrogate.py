r"""Surrogate gradients: what stands in for the derivative of the spike in the backward pass.

A neuron fires ``s = H(u)`` with ``u = h - v_threshold``. The derivative of the Heaviside step is
zero almost everywhere, so training uses a surrogate ``H'(u)``. This table is the only place where
the surrogates known to the fused operators are written down:

==================== ======================= ==========================================
name                 parameters              ``H'(u)``
==================== ======================= ==========================================
sigmoid              alpha                   alpha * S * (1 - S),  S = sigmoid(alpha u)
atan                 alpha                   alpha / 2 / (1 + (pi/2 alpha u)^2)
piecewise_quadratic  alpha                   max(0, alpha - alpha^2 |u|)  (the paper's triangle)
piecewise_exp        alpha                   alpha / 2 * exp(-alpha |u|)
soft_sign            alpha                   1 / (2 alpha (1/alpha + |u|)^2)
erf                  alpha                   alpha / sqrt(pi) * exp(-(alpha u)^2)
leaky_k_relu         leak, k                 k where u >= 0, leak elsewhere
rectangle            alpha                   alpha where |u| < 1 / (2 alpha), 0 elsewhere
fast_sigmoid         slope                   1 / (1 + slope |u|)^2
sparse_fast_sigmoid  slope, bound            1 / (1 + slope |u|)^2 where u > bound, 0 elsewhere
spike_rate_escape    beta, slope             slope * exp(-beta |u - 1|)
leaky_spike          leak                    1 where u > 0, leak elsewhere
logistic             slope                   as sigmoid, from sigmoid(-slope |u|): its tails keep their digits
==================== ======================= ==========================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sltt_ext.errors import ConfigurationError


@dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient of the table above, with its parameters in the table's order, as floats.

    Raises:
        ConfigurationError: If the name or the number of parameters is not in the table.

    Examples:
        >>> Surrogate("sigmoid", (4.0,))
        Surrogate(name='sigmoid', parameters=(4.0,))
    """

    name: str = "sigmoid"
    parameters: tuple[float, ...] = (4.0,)

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise ConfigurationError(f"unknown surrogate {self.name!r}; known are {', '.join(SURROGATES)}")
        expected = SURROGATES[self.name].parameters
        if len(self.parameters) != len(expected):
            raise ConfigurationError(
                f"surrogate {self.name!r} takes ({', '.join(expected)}), got {self.parameters}"
            )
        # a CUDA kernel is given its numbers by their type: an integer would be read as the bits of a float
        object.__setattr__(self, "parameters", tuple(map(float, self.parameters)))


@dataclass(frozen=True)
class SurrogateDefinition:
    """One row of the table.

    Attributes:
        parameters: Names of the parameters, in order.
        derivative: ``(u, scale, *parameters) -> scale * H'(u)``. It may overwrite ``u`` and return it:
            the caller owns ``u`` and forgets it.
        constants: ``(scale, *parameters) ->`` the numbers ``c0``, ``c1``, ``c2`` of the CUDA statements.
        cuda: The same function of ``float u`` as CUDA statements, in the same order of operations.
    """

    parameters: tuple[str, ...]
    derivative: Callable[..., Tensor]
    constants: Callable[..., tuple[float, ...]]
    cuda: str


def derivative(u: Tensor, name: str, parameters: Sequence[float], scale: float = 1.0) -> Tensor:
    """``scale * H'(u)`` for the named surrogate, computed in the memory of ``u``."""
    return SURROGATES[name].derivative(u, scale, *parameters)


@functools.lru_cache(maxsize=256)  # at every launch of a kernel
def constants(name: str, parameters: tuple[float, ...], scale: float = 1.0) -> tuple[float, float, float]:
    """The numbers ``c0``, ``c1``, ``c2`` with which the CUDA statements compute ``scale * H'(u)``."""
    c0, c1, c2 = (*SURROGATES[name].constants(scale, *parameters), 0.0, 0.0, 0.0)[:3]
    return c0, c1, c2


def _number(value: float, like: Tensor) -> Tensor:
    """A number where an operator takes tensors only."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _sigmoid(u: Tensor, scale: float, alpha: float) -> Tensor:
    s = u.mul_(alpha).sigmoid_()
    torch.ops.aten.sigmoid_backward.grad_input(_number(alpha * scale, u), s, grad_input=s)
    return s


def _atan(u: Tensor, scale: float, alpha: float) -> Tensor:
    torch.addcmul(_number(1, u), u, u, value=(math.pi / 2 * alpha) ** 2, out=u)
    return torch.div(_number(alpha / 2 * scale, u), u, out=u)


def _piecewise_quadratic(u: Tensor, scale: float, alpha: float) -> Tensor:
    peak = _number(alpha * scale, u)
    return torch.sub(peak, u.abs_(), alpha=alpha**2 * scale, out=u).clamp_min_(0)


def _piecewise_exp(u: Tensor, scale: float, alpha: float) -> Tensor:
    return u.abs_().mul_(-alpha).exp_().mul_(alpha / 2 * scale)


def _soft_sign(u: Tensor, scale: float, alpha: float) -> Tensor:
    return torch.div(_number(scale / (2 * alpha), u), u.abs_().add_(1 / alpha).pow_(2), out=u)


def _erf(u: Tensor, scale: float, alpha: float) -> Tensor:
    return u.pow_(2).mul_(-(alpha**2)).exp_().mul_(alpha / math.sqrt(math.pi) * scale)


def _leaky_k_relu(u: Tensor, scale: float, leak: float, k: float) -> Tensor:
    return u.ge_(0).mul_((k - leak) * scale).add_(leak * scale)


def _rectangle(u: Tensor, scale: float, alpha: float) -> Tensor:
    return u.abs_().lt_(0.5 / alpha).mul_(alpha * scale)


def _fast_sigmoid(u: Tensor, scale: float, slope: float) -> Tensor:
    return torch.div(_number(scale, u), u.abs_().mul_(slope).add_(1).pow_(2), out=u)


def _sparse_fast_sigmoid(u: Tensor, scale: float, slope: float, bound: float) -> Tensor:
    above = u > bound
    return _fast_sigmoid(u, scale, slope).mul_(above)


def _spike_rate_escape(u: Tensor, scale: float, beta: float, slope: float) -> Tensor:
    return u.sub_(1).abs_().mul_(-beta).exp_().mul_(slope * scale)


def _logistic(u: Tensor, scale: float, slope: float) -> Tensor:
    return _sigmoid(u.abs_().neg_(), scale, slope)


def _leaky_spike(u: Tensor, scale: float, leak: float) -> Tensor:
    return u.gt_(0).mul_((1 - leak) * scale).add_(leak * scale)


SURROGATES: dict[str, SurrogateDefinition] = {
    "sigmoid": SurrogateDefinition(
        ("alpha",),
        _sigmoid,
        lambda scale, alpha: (alpha, alpha * scale),
        "const float s = 1 / (1 + expf(-(u * c0))); return c1 * (1 - s) * s;",
    ),
    "atan": SurrogateDefinition(
        ("alpha",),
        _atan,
        lambda scale, alpha: ((math.pi / 2 * alpha) ** 2, alpha / 2 * scale),
        "return c1 / fmaf(c0 * u, u, 1.0f);",
    ),
    "piecewise_quadratic": SurrogateDefinition(
        ("alpha",),
        _piecewise_quadratic,
        lambda scale, alpha: (alpha * scale, alpha**2 * scale),
        "const float d = fmaf(-c1, fabsf(u), c0); return d < 0 ? 0 : d;",
    ),
    "piecewise_exp": SurrogateDefinition(
        ("alpha",),
        _piecewise_exp,
        lambda scale, alpha: (-alpha, alpha / 2 * scale),
        "return expf(fabsf(u) * c0) * c1;",
    ),
    "soft_sign": SurrogateDefinition(
        ("alpha",),
        _soft_sign,
        lambda scale, alpha: (1 / alpha, scale / (2 * alpha)),
        "const float d = fabsf(u) + c0; return c1 / (d * d);",
    ),
    "erf": SurrogateDefinition(
        ("alpha",),
        _erf,
        lambda scale, alpha: (-(alpha**2), alpha / math.sqrt(math.pi) * scale),
        "return expf(u * u * c0) * c1;",
    ),
    "leaky_k_relu": SurrogateDefinition(
        ("leak", "k"),
        _leaky_k_relu,
        lambda scale, leak, k: ((k - leak) * scale, leak * scale),
        "return (u >= 0 ? 1.0f : 0.0f) * c0 + c1;",
    ),
    "rectangle": SurrogateDefinition(
        ("alpha",),
        _rectangle,
        lambda scale, alpha: (0.5 / alpha, alpha * scale),
        "return (fabsf(u) < c0 ? 1.0f : 0.0f) * c1;",
    ),
    "fast_sigmoid": SurrogateDefinition(
        ("slope",),
        _fast_sigmoid,
        lambda scale, slope: (slope, scale),
        "const float d = fabsf(u) * c0 + 1; return c1 / (d * d);",
    ),
    "sparse_fast_sigmoid": SurrogateDefinition(
        ("slope", "bound"),
        _sparse_fast_sigmoid,
        lambda scale, slope, bound: (slope, scale, bound),
        "const float d = fabsf(u) * c0 + 1; return c1 / (d * d) * (u > c2 ? 1.0f : 0.0f);",
    ),
    "spike_rate_escape": SurrogateDefinition(
        ("beta", "slope"),
        _spike_rate_escape,
        lambda scale, beta, slope: (-beta, slope * scale),
        "return expf(fabsf(u - 1) * c0) * c1;",
    ),
    "leaky_spike": SurrogateDefinition(
        ("leak",),
        _leaky_spike,
        lambda scale, leak: ((1 - leak) * scale, leak * scale),
        "return (u > 0 ? 1.0f : 0.0f) * c0 + c1;",
    ),
    "logistic": SurrogateDefinition(
        ("slope",),
        _logistic,
        lambda scale, slope: (slope, slope * scale),
        "const float s = 1 / (1 + expf(fabsf(u) * c0)); return c1 * (1 - s) * s;",
    ),
}
