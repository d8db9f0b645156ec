"""Launch geometry: how a kernel covers its elements. Pure arithmetic, no device.

A kernel handles ``elements`` neighbouring numbers per row, ``rows`` rows one after the other in memory. A thread
loads ``width`` of them at once; thread ``b * THREADS + i`` of block ``b`` starts at pack ``b * THREADS + i`` and
goes on in strides of the whole grid, so any number of blocks covers everything exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MAX_BLOCKS", "MAX_PARTIAL_SUMS", "THREADS", "Geometry", "launch_geometry"]

THREADS = 256
"""Threads of a block: eight warps, a divisor of what every device keeps resident."""

MAX_BLOCKS = 2**31 - 1
"""CUDA's limit for the first dimension of a grid."""

MAX_PARTIAL_SUMS = 1024
"""Blocks of a kernel that reduces, each writing one partial sum; the same on every device, so that sums are too."""

_LOAD_BYTES = 16
_ENOUGH_THREADS = 2**16


@dataclass(frozen=True)
class Geometry:
    """Grid of ``blocks`` blocks of ``THREADS`` threads, each handling ``width`` neighbouring elements at once."""

    width: int
    blocks: int


def launch_geometry(
    elements: int,
    itemsize: int,
    addresses: Iterable[int],
    rows: int = 1,
    max_blocks: int = MAX_BLOCKS,
) -> Geometry:
    """The geometry for ``rows`` rows of ``elements`` elements, as wide as alignment allows.

    Args:
        elements: Elements of a row; at least 1.
        itemsize: Bytes of an element of the narrowest array.
        addresses: Where the arrays start. The float32 ones among them need ``4 w`` bytes of alignment, up to 16,
            for loads of ``w`` elements; so does every row, hence ``elements`` has to be a multiple of ``w``.
        rows: Rows that are handled independently of each other.
        max_blocks: The most blocks to use.

    Examples:
        >>> launch_geometry(2**20, 4, [0, 4096])
        Geometry(width=4, blocks=1024)
        >>> launch_geometry(2**20 + 2, 4, [0, 4096]).width
        2
    """
    width = _LOAD_BYTES // itemsize
    offsets = 0
    for address in addresses:
        offsets |= address
    while width > 1 and (elements % width or offsets % min(_LOAD_BYTES, 4 * width)):
        width //= 2
    while width > 1 and rows * elements // width < _ENOUGH_THREADS:
        width //= 2  # a small tensor: rather more threads than wider loads
    packs = rows * (elements // width)
    return Geometry(width, min(-(-packs // THREADS), max_blocks))
