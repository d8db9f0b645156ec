"""What the data modules have in common: options, loaders, and errors that say what to do."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset

from sltt_ext.data.corrupt import CheckedDataset, CheckedLoader, collate
from sltt_ext.errors import ConfigurationError, DataError
from sltt_ext.optional import require

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    require("lightning", extra="train")
    from lightning.pytorch import LightningDataModule

__all__ = ["DataModule", "check_positive"]


class DataModule(LightningDataModule):
    """A data set as a LightningDataModule; its loaders work in a loop of your own as well.

    The training loader shuffles with torch's default generator. There is no validation set in these experiments:
    the test set is the loader of both validation and test, as in the published ones.

    Args:
        root: The set's folder; None is ``default_root``, from where the program runs.
        batch_size: Samples of a batch; of each process, where there are several.
        workers: Processes that load ahead; 0 loads in the training process.
        on_corrupt: What to do about a file that cannot be read: ``"raise"`` a `DataError` that names it, or
            ``"skip"`` it with one `SLTTWarning` that names it. A skipped sample is left out of its batch; none
            takes its place, so that no test sample counts twice.
        num_classes: The number of classes the network is made for, to be checked against the set's.

    Attributes:
        num_classes: The number of classes.
        in_channels: Channels of one image or frame.
        time_steps: T of event frames ``[N, T, ...]``; None for images ``[N, ...]``.
        time_dim: What `OnlineTrainer` takes by that name: 1 for event frames, None for images.

    Raises:
        MissingDependencyError: On import, if Lightning is not installed.
        ConfigurationError: If an option has a value that cannot work.
        DataError: From the loaders, `prepare_data` and `setup`, if the set is absent, incomplete or damaged.
    """

    title: ClassVar[str]
    default_root: ClassVar[str | None] = None
    default_classes: ClassVar[int]
    in_channels: ClassVar[int]
    drop_last: ClassVar[bool] = False
    time_steps: int | None = None
    time_dim: Literal[0, 1] | None = None

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        batch_size: int = 128,
        workers: int = 0,
        on_corrupt: str = "raise",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("batch_size", batch_size)
        if workers < 0:
            raise ConfigurationError(f"workers must be 0 or more, got {workers}")
        if on_corrupt not in ("raise", "skip"):
            raise ConfigurationError(f"on_corrupt must be 'raise' or 'skip', got {on_corrupt!r}")
        if num_classes is not None:
            check_positive("num_classes", num_classes)
        self.root = Path(root if root is not None else self.default_root or ".")
        self.batch_size = batch_size
        self.workers = workers
        self.on_corrupt = on_corrupt
        self._num_classes = num_classes
        self._sets: dict[bool, CheckedDataset] = {}

    @property
    def num_classes(self) -> int:
        """The number of classes: as given, or the set's."""
        return self._num_classes or self.default_classes

    @abstractmethod
    def open_set(self, train: bool) -> tuple[Dataset[Any], int]:
        """The training or test set with its transforms, and its number of classes."""

    def setup(self, stage: str | None = None) -> None:
        """Open both sets, once, and check their classes."""
        if not self._sets:
            self._sets = {train: self._checked(train) for train in (True, False)}

    @property
    def train_set(self) -> CheckedDataset:
        """The training set: ``(image or frames, class index)``."""
        return self._set(train=True)

    @property
    def test_set(self) -> CheckedDataset:
        """The test set: ``(image or frames, class index)``."""
        return self._set(train=False)

    def train_dataloader(self) -> CheckedLoader:
        """Batches of the training set, shuffled."""
        if self.drop_last and len(self.train_set) < self.batch_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} makes no batch of {len(self.train_set)} training samples, as the "
                "last incomplete batch is dropped: make it smaller"
            )
        return self._loader(self.train_set, shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> CheckedLoader:
        """Batches of the test set, in order."""
        return self._loader(self.test_set)

    def test_dataloader(self) -> CheckedLoader:
        """Batches of the test set, in order."""
        return self._loader(self.test_set)

    def _set(self, train: bool) -> CheckedDataset:
        if not self._sets:
            self.prepare_data()
            self.setup()
        return self._sets[train]

    def _checked(self, train: bool) -> CheckedDataset:
        dataset, classes = self.open_set(train)
        if classes != self.num_classes:
            raise DataError(
                f"{self.title} at {self.root} has {classes} classes, not {self.num_classes}: give the network "
                f"{classes} outputs and num_classes={classes}, or complete the set"
            )
        return CheckedDataset(dataset, self.on_corrupt)

    def _loader(
        self, dataset: CheckedDataset, *, shuffle: bool = False, drop_last: bool = False
    ) -> CheckedLoader:
        return CheckedLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.workers,
            # for exact resume: every epoch starts its workers anew, and evaluation draws from no generator of training
            persistent_workers=self.workers > 0 and not shuffle,
            generator=None if shuffle else torch.Generator(),
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )


def check_positive(name: str, value: int) -> None:
    """Raise `ConfigurationError` unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a positive integer, got {value!r}")
