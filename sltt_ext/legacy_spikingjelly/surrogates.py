"""Surrogate functions of any origin as rows of `sltt_ext.surrogate`, where they compute the same numbers."""

from __future__ import annotations

from typing import Any

import torch

from sltt_ext.surrogate import SURROGATES, Surrogate, derivative

__all__ = ["known_surrogate"]

_NAMES = {
    "Sigmoid": "sigmoid",
    "ATan": "atan",
    "PiecewiseQuadratic": "piecewise_quadratic",
    "PiecewiseExp": "piecewise_exp",
    "SoftSign": "soft_sign",
    "Erf": "erf",
    "LeakyKReLU": "leaky_k_relu",
    "Rect": "rectangle",
}

_ROWS: dict[tuple[Any, ...], Surrogate | None] = {}  # compared once: this is asked at every step


def known_surrogate(function: object) -> Surrogate | None:
    """The row that computes what ``function`` does, or None."""
    name = _NAMES.get(type(function).__name__)
    if name is None or not getattr(function, "spiking", True):
        return None
    parameters = tuple(getattr(function, parameter, None) for parameter in SURROGATES[name].parameters)
    if not all(isinstance(parameter, (int, float)) for parameter in parameters):
        return None
    key = (type(function), parameters)
    if key not in _ROWS:
        row = Surrogate(name, tuple(map(float, parameters)))  # type: ignore[arg-type]
        _ROWS[key] = row if _computes(function, row) else None
    return _ROWS[key]


def _computes(function: object, row: Surrogate) -> bool:
    """Whether ``function`` fires as the Heaviside step does, with the derivative of ``row``."""
    u = torch.cat([torch.linspace(-3, 3, 121), torch.tensor([0.0, 1e-6, -1e-6, 20.0, -20.0])])
    with torch.inference_mode(False), torch.enable_grad():
        leaf = u.clone().requires_grad_()
        try:
            spikes = function(leaf)  # type: ignore[operator]
            (gradient,) = torch.autograd.grad(spikes.sum(), leaf)
        except Exception:
            return False  # it takes something else, or is no function of one number at a time
        expected = derivative(u.clone(), row.name, row.parameters)
    return torch.equal(spikes.detach(), (u >= 0).to(u)) and torch.allclose(
        gradient, expected, rtol=1e-5, atol=1e-7
    )
