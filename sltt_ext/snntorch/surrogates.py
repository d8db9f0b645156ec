"""snnTorch's surrogate gradients as rows of `sltt_ext.surrogate`.

snnTorch makes a surrogate with a factory, ``surrogate.atan(alpha=2)``, that returns a closure over the
parameters. Its sigmoid is NaN where ``slope * u < -88`` (the exponential overflows in float32); the row is
the same function without the overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snntorch import surrogate

from sltt_ext.surrogate import Surrogate

__all__ = ["known_surrogate"]

_ROWS: dict[str, Callable[..., tuple[str, tuple[float, ...]]]] = {
    "atan": lambda alpha: ("atan", (alpha,)),
    "fast_sigmoid": lambda slope: ("fast_sigmoid", (slope,)),
    "sigmoid": lambda slope: ("logistic", (slope,)),
    "triangular": lambda threshold: ("leaky_k_relu", (threshold, -threshold)),
    "straight_through_estimator": lambda: ("leaky_spike", (1.0,)),
    "heaviside": lambda: ("leaky_spike", (0.0,)),
    "SFS": lambda B, slope: ("sparse_fast_sigmoid", (slope, B)),  # noqa: N803  snnTorch's name
    "spike_rate_escape": lambda beta, slope: ("spike_rate_escape", (beta, slope)),
}

_MADE: dict[tuple[Any, ...], Surrogate] = {}  # made once: this is asked at every step


def known_surrogate(function: Any) -> Surrogate | None:
    """The row that computes what ``function`` does, or None.

    None for any function that is not one of snnTorch's own (it may compute anything), for those that
    are no function of the potential alone (``SSO`` draws random numbers), and for a parameter that is
    not a number.

    Examples:
        >>> known_surrogate(surrogate.fast_sigmoid(slope=25))
        Surrogate(name='fast_sigmoid', parameters=(25.0,))
    """
    factory = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner")
    if getattr(function, "__module__", None) != surrogate.__name__ or factory not in _ROWS:
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    values = {name: cell.cell_contents for name, cell in cells}
    if not all(isinstance(value, (int, float)) for value in values.values()):
        return None
    key = (factory, *values.values())
    if key not in _MADE:
        name, parameters = _ROWS[factory](**values)
        _MADE[key] = Surrogate(name, tuple(map(float, parameters)))
    return _MADE[key]
