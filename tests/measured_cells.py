"""Cells for `test_gpu_proof`, in a module that another process can import: what each does is its name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell that does what it is told."""

    does: str
    limit: float = 30.0
    environment: tuple[tuple[str, str], ...] = ()

    def row(self, status=""):
        return {"does": self.does, "status": status, "process": "", "variable": ""}


def measure(cell):
    if cell.does == "crash":
        os._exit(7)
    if cell.does == "hang":
        time.sleep(60)
    status = "failed: CUDA error: an illegal memory access" if cell.does == "poison" else ""
    return {**cell.row(status), "process": os.getpid(), "variable": os.environ.get("MEASURED", "")}


def out_of_memory(*_):
    import torch  # not above: the other processes start faster without

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
