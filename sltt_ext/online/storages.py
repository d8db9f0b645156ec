"""Which memory a tensor uses."""

from __future__ import annotations

from torch import Tensor

__all__ = ["storage_of"]


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory; 0 where it has none of its own, as a tensor made of others."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return 0
