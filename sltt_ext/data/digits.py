"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images that come with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sltt_ext.optional import require

__all__ = ["Digits", "load_digits"]

TEST_IMAGES = 500


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` with values from 0 to 1, and class indices ``[N]`` from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> Digits:
        """The same data on ``device``."""
        return Digits(*(tensor.to(device) for tensor in vars(self).values()))


def load_digits() -> Digits:
    """1,297 training and 500 test images, always the same split.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998, as
    shipped with scikit-learn.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", extra="demo").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])
