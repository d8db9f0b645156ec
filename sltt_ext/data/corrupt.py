"""Files that cannot be read in the middle of an epoch: named, and raised or left out of their batch."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from sltt_ext.errors import DataError, SLTTError, warn

__all__ = ["CheckedDataset", "CheckedLoader", "NamedReader", "collate"]

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
ENOUGH_BYTES = 1 << 28
"""A machine that has so much memory left is not out of it: a file that needs more asks for what it cannot hold."""


@dataclass(frozen=True)
class NamedReader:
    """Reads one file; whatever it makes the reader raise becomes a `DataError` that names it.

    What is the machine's fault and not the file's stays what it is: too many open files, no memory left, a `WriteError`.

    Args:
        read: ``path -> content``.
    """

    read: Callable[[str], Any]

    def __call__(self, path: str | Path) -> Any:
        """The content of the file at ``path``."""
        try:
            return self.read(str(path))
        except SLTTError:
            raise
        except Exception as error:  # a damaged file makes readers raise anything
            if _is_the_machines(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} cannot be read ({reason})") from error


def _is_the_machines(error: Exception) -> bool:
    """Whether other files would raise this as well."""
    if not isinstance(error, MemoryError):
        return isinstance(error, OSError) and error.errno in OUT_OF_RESOURCES
    try:
        bytearray(ENOUGH_BYTES)
    except MemoryError:
        return True
    return False


@dataclass(frozen=True)
class Corrupt:
    """Stands in a batch for a sample that could not be read."""

    reason: str


class CheckedDataset(Dataset[Any]):
    """A data set that marks, in what it gives a loader, the samples that cannot be read. An index of one raises.

    Args:
        dataset: Raises `DataError` for a sample that cannot be read.
        on_corrupt: What `CheckedLoader` does about it: ``"raise"`` or ``"skip"``.
    """

    def __init__(self, dataset: Dataset[Any], on_corrupt: str) -> None:
        self.dataset = dataset
        self.on_corrupt = on_corrupt
        self.warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._sample_or_mark(index) for index in indices]

    def _sample_or_mark(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return Corrupt(str(error))


def collate(samples: Sequence[Any]) -> tuple[Any, list[str]]:
    """The batch of the samples that could be read, None if there are none, and why the others could not."""
    readable = [sample for sample in samples if not isinstance(sample, Corrupt)]
    reasons = [sample.reason for sample in samples if isinstance(sample, Corrupt)]
    return (default_collate(readable) if readable else None), reasons


class CheckedLoader(DataLoader[Any]):
    """A DataLoader of a `CheckedDataset` with `collate`. Raises and warns in the main process, each file once."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises:
            DataError: If a sample cannot be read and is not to be skipped, or nothing of a batch can be read.
        """
        dataset: CheckedDataset = self.dataset  # type: ignore[assignment]
        for batch, reasons in super().__iter__():
            if reasons and dataset.on_corrupt == "raise":
                raise DataError(f"{reasons[0]}: restore it, or pass on_corrupt='skip'")
            if batch is None:
                raise DataError("nothing of this batch can be read:\n  " + "\n  ".join(reasons))
            for reason in sorted(set(reasons) - dataset.warned):
                dataset.warned.add(reason)
                warn(f"skipped: {reason}")
            yield batch
