"""SpikingJelly's surrogate functions as rows of `sltt_ext.surrogate`."""

from __future__ import annotations

from spikingjelly.activation_based import surrogate

from sltt_ext.surrogate import SURROGATES, Surrogate

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

_KNOWN = {getattr(surrogate, name): row for name, row in _NAMES.items() if hasattr(surrogate, name)}

_ROWS: dict[tuple[str, tuple[float, ...]], Surrogate] = {}  # made once: this is asked at every step


def known_surrogate(function: object) -> Surrogate | None:
    """The row that computes what ``function`` does, or None.

    None for a subclass (it may compute anything), for a parameter that is not a number (it may be
    learned), and outside of spiking mode.
    """
    name = _KNOWN.get(type(function))
    if name is None or not getattr(function, "spiking", True):
        return None
    parameters = tuple(getattr(function, parameter) for parameter in SURROGATES[name].parameters)
    if not all(isinstance(parameter, (int, float)) for parameter in parameters):
        return None
    if (name, parameters) not in _ROWS:
        _ROWS[name, parameters] = Surrogate(name, tuple(map(float, parameters)))
    return _ROWS[name, parameters]
