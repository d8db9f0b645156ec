"""Every test of this folder has the declarations of `declared_neurons`."""

from declared_neurons import declared  # noqa: F401
