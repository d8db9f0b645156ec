"""CIFAR-10, CIFAR-100, ImageNet, and folders of small images, with the transforms of the paper's experiments."""

from __future__ import annotations

import math
import pickle
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import Dataset

from sltt_ext.data.archives import downloading
from sltt_ext.data.corrupt import NamedReader
from sltt_ext.data.module import DataModule, check_positive
from sltt_ext.errors import DataError
from sltt_ext.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision import datasets, transforms
    from torchvision.datasets.folder import default_loader
    from torchvision.datasets.utils import check_integrity
else:
    require("torchvision", extra="train")
    from torchvision import datasets, transforms
    from torchvision.datasets.folder import default_loader
    from torchvision.datasets.utils import check_integrity

__all__ = ["CIFAR10Data", "CIFAR100Data", "Cutout", "ImageFolderData", "ImageNetData"]

Statistics = tuple[float, float, float]
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Cutout:
    """With probability 1/2, paint one random rectangle of an image, as in the published experiments.

    These use torchtoolbox's ``Cutout()``: an area uniform in 2 % to 40 % of the image's, height over width uniform in
    0.4 to 2.5 (torchvision's ``RandomErasing`` draws that log-uniformly), at a uniform place. The colour is a whole
    number from 0 to 255 that Pillow takes for an RGB image as (number, 0, 0): black to red, before normalisation.
    """

    def __call__(self, image: Image) -> Image:
        """``image`` (RGB) with or without the rectangle; it is changed in place."""
        draw = torch.rand(5).tolist()
        if draw[0] >= 0.5:
            return image
        area = (0.02 + 0.38 * draw[1]) * image.width * image.height
        ratio = 0.4 + 2.1 * draw[2]
        width = min(int(math.sqrt(area / ratio)), image.width)
        height = min(int(math.sqrt(area * ratio)), image.height)
        left = int(draw[3] * (image.width - width + 1))
        top = int(draw[4] * (image.height - height + 1))
        red = int(torch.randint(256, ()))
        image.paste((red, 0, 0), (left, top, left + width, top + height))
        return image


def small_image_transform(train: bool, size: int, mean: Statistics, std: Statistics) -> transforms.Compose:
    """CIFAR's transforms: crop after padding by size / 8 (32: 4), `Cutout`, flip, normalise; to test: normalise."""
    augment = [
        transforms.RandomCrop(size, padding=size // 8),
        Cutout(),
        transforms.RandomHorizontalFlip(),
    ]
    last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose([*augment, *last] if train else last)


class CIFAR10Data(DataModule):
    """CIFAR-10: 50,000 images ``[N, 3, 32, 32]`` to train on, 10,000 to test.

    Args and Raises: those of `DataModule`; a file holds 10,000 images or more, so a damaged one is always raised.
        download: Download the set (170 MB) where it is absent.
        checksums: Whether the files must be the published ones; False takes any of their format. They are
            Python pickles: take none from a source you do not trust.
    """

    title = "CIFAR-10"
    default_root = "data/cifar10"
    default_classes = 10
    in_channels = 3
    source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    mean: ClassVar[Statistics] = CIFAR10_MEAN
    std: ClassVar[Statistics] = CIFAR10_STD

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        download: bool = False,
        checksums: bool = True,
        batch_size: int = 128,
        workers: int = 0,
        on_corrupt: str = "raise",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(
            root, batch_size=batch_size, workers=workers, on_corrupt=on_corrupt, num_classes=num_classes
        )
        self.download = download
        self.checksums = checksums

    def prepare_data(self) -> None:
        """Download the set, if asked to and it is not there."""
        if self.download and self._missing():
            with downloading(self.source.url, self.root):
                _unchecked(self.source)(str(self.root), download=True)  # the archive's own checksum holds

    def open_set(self, train: bool) -> tuple[Dataset[Any], int]:
        """The training or test set with its transforms, and its number of classes."""
        self._check_files()
        transform = small_image_transform(train, 32, self.mean, self.std)
        source: Any = _unchecked(self.source)
        dataset = NamedReader(partial(source, train=train, transform=transform))(self.root)
        if len(set(map(len, (dataset.data, dataset.targets)))) != 1:
            raise DataError(f"{self._folder} has {len(dataset.data)} images, {len(dataset.targets)} labels")
        return dataset, max(len(dataset.classes), max(dataset.targets) + 1)

    @property
    def _folder(self) -> Path:
        return self.root / self.source.base_folder

    def _files(self) -> dict[Path, str]:
        """Each file of the set, and its MD5."""
        listed = [*self.source.train_list, *self.source.test_list]
        meta = self.source.meta
        return {self._folder / name: md5 for name, md5 in [*listed, (meta["filename"], meta["md5"])]}

    def _missing(self) -> list[str]:
        return [path.name for path in self._files() if not path.is_file()]

    def _check_files(self) -> None:
        if missing := self._missing():
            raise DataError(
                f"{self.title} is not in {self.root} ({', '.join(missing)} missing from {self._folder}): download "
                f"{self.source.url} and unpack it in {self.root}, or pass download=True"
            )
        read = NamedReader(_unpickle)
        for path, md5 in self._files().items():
            if not self.checksums:
                read(path)
            elif not check_integrity(str(path), md5):
                raise DataError(
                    f"{path} is not the published file: its MD5 is not {md5}. Unpack {self.source.url} again in "
                    f"{self.root}; checksums=False takes other files of the same format"
                )


class CIFAR100Data(CIFAR10Data):
    """CIFAR-100: 50,000 images ``[N, 3, 32, 32]`` of 100 classes to train on, 10,000 to test.

    Args and Raises: those of `CIFAR10Data`.
    """

    title = "CIFAR-100"
    default_root = "data/cifar100"
    default_classes = 100
    source = datasets.CIFAR100
    mean = CIFAR100_MEAN
    std = CIFAR100_STD


class _FolderData(DataModule):
    """Images in one folder a class; the training and test sets in a folder each."""

    in_channels = 3
    test_folder: ClassVar[str]
    where_from: ClassVar[str]

    def open_set(self, train: bool) -> tuple[Dataset[Any], int]:
        """The training or test set with its transforms, and its number of classes."""
        classes = self._classes("train")
        if (found := self._classes(self.test_folder)) != classes:
            unpaired = ", ".join(sorted(set(found) ^ set(classes))[:5])
            raise DataError(
                f"{self.root}: train and {self.test_folder} have different class folders ({unpaired}, ...): "
                "make them the same, or labels mean different classes"
            )
        folder = self.root / ("train" if train else self.test_folder)
        try:
            dataset = datasets.ImageFolder(
                str(folder), self.transform(train), loader=NamedReader(default_loader)
            )
        except FileNotFoundError as error:  # a class folder without images
            raise DataError(f"{self.title} at {self.root} is incomplete: {error}") from error
        return dataset, len(classes)

    def transform(self, train: bool) -> transforms.Compose:
        """What is done to an image."""
        raise NotImplementedError

    def _classes(self, split: str) -> list[str]:
        folder = self.root / split
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not classes:
            raise DataError(
                f"{self.title} is not in {self.root} (no class folders in {folder}): {self.where_from} so that "
                f"images are in {self.root / 'train'}/CLASS/ and {self.root / self.test_folder}/CLASS/"
            )
        return classes


class ImageFolderData(_FolderData):
    """Your own small images, ``ROOT/train/CLASS/*.jpg`` and ``ROOT/test/CLASS/*.jpg``, with CIFAR's transforms.

    Images are RGB ``[N, 3, image_size, image_size]``, resized where they are of another size.

    Args and Raises: those of `DataModule`; the number of classes is that of the folders.
        image_size: Height and width in pixels.
        mean: Mean of each channel over the set, of values from 0 to 1; the default is CIFAR-10's.
        std: Standard deviation of each channel.
    """

    title = "The image folder"
    default_root = "data/image_folder"
    test_folder = "test"
    where_from = "put your images there,"

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        image_size: int = 32,
        mean: Statistics = CIFAR10_MEAN,
        std: Statistics = CIFAR10_STD,
        batch_size: int = 128,
        workers: int = 0,
        on_corrupt: str = "raise",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(
            root, batch_size=batch_size, workers=workers, on_corrupt=on_corrupt, num_classes=num_classes
        )
        check_positive("image_size", image_size)
        self.image_size = image_size
        self.mean = mean
        self.std = std

    @property
    def num_classes(self) -> int:
        """The number of classes: as given, or of the class folders to train on."""
        return self._num_classes or len(self._classes("train"))

    def transform(self, train: bool) -> transforms.Compose:
        """Resize where needed, then CIFAR's transforms."""
        rest = small_image_transform(train, self.image_size, self.mean, self.std)
        return transforms.Compose([transforms.Resize((self.image_size, self.image_size)), rest])


class ImageNetData(_FolderData):
    """ImageNet (ILSVRC 2012): 1.28 million images ``[N, 3, 224, 224]`` to train on, 50,000 to test.

    Args and Raises: those of `DataModule`; ``num_classes`` is for a part of the set's 1000 classes.
    """

    title = "ImageNet"
    default_root = "data/imagenet"
    default_classes = 1000
    test_folder = "val"
    where_from = (
        "register at https://image-net.org/download.php, download ILSVRC2012_img_train.tar and "
        "ILSVRC2012_img_val.tar and unpack them"
    )

    def transform(self, train: bool) -> transforms.Compose:
        """Random resized crop and flip; to test, the middle 224 pixels of an image resized to 256."""
        crop = (
            [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
            if train
            else [transforms.Resize(256), transforms.CenterCrop(224)]
        )
        return transforms.Compose(
            [*crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )


def _unchecked(source: type[datasets.CIFAR10]) -> type[datasets.CIFAR10]:
    """Torchvision's class without checksums; ours are done by then."""
    return type(
        source.__name__,
        (source,),
        {
            "train_list": [[name, None] for name, _ in source.train_list],
            "test_list": [[name, None] for name, _ in source.test_list],
            "meta": {**source.meta, "md5": None},
        },
    )


def _unpickle(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")
