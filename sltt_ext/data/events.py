"""DVS128 Gesture and CIFAR10-DVS as frames of events, with the transforms of the paper's experiments."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sltt_ext.data.archives import CIFAR10_DVS, DVS_GESTURE, ArchivedSet
from sltt_ext.data.corrupt import NamedReader
from sltt_ext.data.module import DataModule, check_positive
from sltt_ext.data.recordings import (
    check_frames,
    cifar10_dvs_events,
    gesture_events,
    prepare_frames,
    read_frames,
)
from sltt_ext.errors import DataError
from sltt_ext.optional import require

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.datasets import DatasetFolder
else:
    require("torchvision", extra="train")
    from PIL import Image
    from torchvision.datasets import DatasetFolder

__all__ = ["CIFAR10DVSData", "DVSGestureData", "bytes_at_48_pixels"]

FIRST_TEST_NUMBER = 900


class _EventData(DataModule):
    """Frames of the same number of events each, made once and kept in SpikingJelly's folders."""

    in_channels = 2
    time_dim = 1
    time_steps: int
    source: ClassVar[ArchivedSet]

    def __init__(
        self,
        root: str | Path | None,
        time_steps: int,
        download: bool,
        batch_size: int,
        workers: int,
        on_corrupt: str,
        num_classes: int | None,
    ) -> None:
        super().__init__(
            root, batch_size=batch_size, workers=workers, on_corrupt=on_corrupt, num_classes=num_classes
        )
        check_positive("time_steps", time_steps)
        self.time_steps = time_steps
        self.download = download

    @staticmethod
    @abstractmethod
    def convert(extract: Path, events: Path) -> list[str]:
        """Make the events of each sample of what was in the archives; returns what could not be read."""

    def prepare_data(self) -> None:
        """Make what is missing of the set's folders; see `sltt_ext.data.recordings`."""
        prepare_frames(
            self.root,
            self.time_steps,
            source=self.source,
            convert=self.convert,
            download=self.download,
            on_corrupt=self.on_corrupt,
        )

    def setup(self, stage: str | None = None) -> None:
        """Open both sets and check that all frames are there, and their classes."""
        self.prepare_data()
        self._frames = check_frames(self.root, self.time_steps, on_corrupt=self.on_corrupt)
        super().setup(stage)

    def _open(self, folder: Path, transform: Any) -> DatasetFolder:
        """What SpikingJelly's data sets are, too."""
        read = NamedReader(partial(read_frames, time_steps=self.time_steps))
        return DatasetFolder(str(folder), read, (".npz",), transform, allow_empty=True)


class DVSGestureData(_EventData):
    """DVS128 Gesture: frames ``[N, T, 2, 128, 128]`` of event counts, no transform; 1,176 to train on, 288 to test.

    The last, incomplete batch of the training set is dropped, as published.

    Args and Raises: those of `DataModule`.
        time_steps: T, the number of frames; each is of the same number of events.
        download: Refused, with what to download by hand: there is no address for programs.
    """

    title = "DVS128 Gesture"
    default_root = "data/dvs_gesture"
    default_classes = 11
    drop_last = True
    source = DVS_GESTURE
    convert = staticmethod(gesture_events)

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        time_steps: int = 20,
        download: bool = False,
        batch_size: int = 16,
        workers: int = 0,
        on_corrupt: str = "raise",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(root, time_steps, download, batch_size, workers, on_corrupt, num_classes)

    def open_set(self, train: bool) -> tuple[Dataset[Any], int]:
        """The training or test set, and its number of classes."""
        dataset = self._open(self._frames / ("train" if train else "test"), torch.from_numpy)
        return dataset, len(dataset.classes)


class CIFAR10DVSData(_EventData):
    """CIFAR10-DVS: frames ``[N, T, 2, 48, 48]``; the first 900 of each class to train on, the last 100 to test.

    Counts go through `bytes_at_48_pixels`, as published.

    Args and Raises: those of `DataModule`.
        time_steps: T, the number of frames; each is of the same number of events.
        download: Download the set where it is absent.
    """

    title = "CIFAR10-DVS"
    default_root = "data/cifar10_dvs"
    default_classes = 10
    source = CIFAR10_DVS
    convert = staticmethod(cifar10_dvs_events)

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        time_steps: int = 10,
        download: bool = False,
        batch_size: int = 128,
        workers: int = 0,
        on_corrupt: str = "raise",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(root, time_steps, download, batch_size, workers, on_corrupt, num_classes)

    def open_set(self, train: bool) -> tuple[Dataset[Any], int]:
        """The training or test set with its transforms, and its number of classes."""
        dataset = self._open(self._frames, bytes_at_48_pixels)
        chosen = [i for i, (path, _) in enumerate(dataset.samples) if _is_to_train_on(path) == train]
        if not chosen:
            raise DataError(
                f"{self.title} at {self.root} has no {'training' if train else 'test'} samples: numbers below "
                f"{FIRST_TEST_NUMBER} are for training, the others for testing"
            )
        return Subset(dataset, chosen), len(dataset.classes)


def bytes_at_48_pixels(counts: Any) -> Tensor:
    """What the published experiments make of frames: ToPILImage, Resize(48), ToTensor.

    A count n goes into an image as 255 n modulo 256: 0 for none, then 255, 254, ...: all but binary. The image
    is taken for grey with opacity, so resizing weighs the first channel (OFF events) by the second (ON events):
    where no pixel under a new one has ON events, OFF events vanish.

    Args:
        counts: ``[T, 2, H, W]``, an array of whole numbers.

    Returns:
        ``[T, 2, 48, 48]`` with values from 0 to 1, float32.
    """
    frames = (-counts.astype(np.int64) & 255).astype(np.uint8).transpose(0, 2, 3, 1)
    size = (48, 48)
    small = [
        Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BILINEAR)
        for frame in frames
    ]
    return torch.from_numpy(np.stack(list(map(np.asarray, small)))).permute(0, 3, 1, 2).float() / 255


def _is_to_train_on(path: str) -> bool:
    number = Path(path).stem.rpartition("_")[2]
    if not number.isdigit():
        raise DataError(f"{path} is not named cifar10_CLASS_NUMBER: restore its name")
    return int(number) < FIRST_TEST_NUMBER
