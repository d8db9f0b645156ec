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

_KNOWN = {
    getattr(surrogate, name): (row, SURROGATES[row].parameters)
    for name, row in _NAMES.items()
    if hasattr(surrogate, name)
}

_ROWS: dict[tuple[str, tuple[float, ...]], Surrogate] = {}  # made once: this is asked at every step


def known_surrogate(function: object) -> Surrogate | None:
    """The row that computes what ``function`` does, or None.

    None for a subclass (it may compute anything), for a parameter that is not a number (it may be
    learned), and outside of spiking mode.
    """
    known = _KNOWN.get(type(function))
    if known is None or not getattr(function, "spiking", True):
        return None
    name, names = known
    parameters = tuple([getattr(function, parameter) for parameter in names])
    for parameter in parameters:
        if not isinstance(parameter, (int, float)):
            return None
    row = _ROWS.get((name, parameters))
    if row is None:
        row = _ROWS[name, parameters] = Surrogate(name, tuple(map(float, parameters)))
    return row
