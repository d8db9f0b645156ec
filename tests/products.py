"""Products of two tables of parameters: all of them are slow tests, and enough of them fast ones."""

from collections.abc import Iterable
from typing import Any

import pytest


def spread(first: Iterable[Any], second: Iterable[Any], each: int = 1) -> list[Any]:
    """Every pair, marked slow but for ``each`` partners of each value of ``first``, spread evenly over ``second``.

    With ``first`` the longer of the two, every value of both is in a fast test.
    """
    first, second = list(first), list(second)
    pairs = []
    for i, a in enumerate(first):
        partners = {(i + k * len(second) // each) % len(second) for k in range(each)}
        for j, b in enumerate(second):
            marks = [] if j in partners else pytest.mark.slow
            pairs.append(pytest.param(a, b, marks=marks, id=f"{_named(a)}-{_named(b)}"))
    return pairs


def _named(value: Any) -> str:
    return ", ".join(map(str, value)) if type(value) is tuple else str(value)


def named(value):
    """The name of a case, the same in every process: that of a function, and not where it lies in memory."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={getattr(one, '__name__', one)}" for key, one in value.items()) or "nothing"
    return str(value)
