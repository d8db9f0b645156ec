"""The choice of backend, in one place."""

from __future__ import annotations

from sltt_ext.errors import BackendError

BACKENDS = ("auto", "torch")


def check_backend(backend: str) -> str:
    """Return ``backend`` if it can be used.

    Raises:
        BackendError: If there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; use one of {', '.join(map(repr, BACKENDS))}")
    return backend
