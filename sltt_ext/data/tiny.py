"""Tiny sets in the original file formats, for smoke runs and tests: made up, but their classes can be told apart."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sltt_ext.data.archives import CIFAR10_DVS
from sltt_ext.errors import ConfigurationError
from sltt_ext.files import writing
from sltt_ext.optional import require

__all__ = ["write_tiny"]

SENSOR = 128
EVENTS_PER_SAMPLE = 600
MICROSECONDS_PER_SAMPLE = 1_000_000
EVENT_TYPE = np.dtype([("address", "<u4"), ("t", "<u4")])


def write_tiny(name: str, root: str | Path) -> dict[str, Any]:
    """Write a tiny set of random images or events, the same each time, in the format of the set ``name``.

    Args:
        name: A key of `DATA_SETS`; nothing is written for the embedded sets.
        root: A folder; it is made.

    Returns:
        The options that the set's data module needs besides ``root``.

    Raises:
        ConfigurationError: If there is no set of that name.
        WriteError: If the folder cannot be written.

    Example:
        Examples:
            >>> from tempfile import mkdtemp
            >>> write_tiny("cifar10", mkdtemp())
            {'checksums': False}
    """
    if name not in WRITERS:
        raise ConfigurationError(f"no data set {name!r}: one of {', '.join(WRITERS)}")
    folder = Path(root)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return WRITERS[name](folder, np.random.default_rng(0))


def _nothing(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    return {}


def _cifar10(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """Python pickles: five batches of 20 images, and a test batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = [i % 10 for i in range(20)]
        _pickle(folder / name, {"data": _rows(labels, 10, generator), "labels": labels})
    _pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    return {"checksums": False}


def _cifar100(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """Python pickles: 200 images to train on, 100 to test."""
    folder = root / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    for name, images in {"train": 200, "test": 100}.items():
        labels = [i % 100 for i in range(images)]
        _pickle(folder / name, {"data": _rows(labels, 100, generator), "fine_labels": labels})
    _pickle(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    return {"checksums": False}


def _imagenet(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """JPEGs of 4 classes: 8 to train on and 4 to test of each."""
    _jpegs(root, {"train": 8, "val": 4}, 4, 96, "JPEG", generator)
    return {"num_classes": 4}


def _image_folder(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """JPEGs of 10 classes: 8 to train on and 4 to test of each."""
    _jpegs(root, {"train": 8, "test": 4}, 10, 32, "jpg", generator)
    return {}


def _dvs_gesture(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """AEDAT 3.1 recordings of two users to train on and one to test, all 11 gestures of each."""
    folder = root / "extract" / "DvsGesture"
    folder.mkdir(parents=True, exist_ok=True)
    for split, users in {"train": (1, 2), "test": (24,)}.items():
        names = [f"user{user:02d}_led" for user in users]
        (folder / f"trials_to_{split}.txt").write_text("".join(f"{name}.aedat\n" for name in names))
        for name in names:
            _write_gestures(folder / f"{name}.aedat", generator)
    return {}


def _cifar10_dvs(root: Path, generator: np.random.Generator) -> dict[str, Any]:
    """AEDAT 2.0 recordings: 3 to train on and 1 to test of each class."""
    for label, archive in enumerate(CIFAR10_DVS.archives):
        name = archive.inside
        folder = root / "extract" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in (0, 1, 2, 900):
            t, x, y, p = _moving_bar(label, 10, generator)
            address = (127 - x) << 8 | (127 - y) << 1 | (1 - p)
            events = np.stack([address, t], 1).astype(">u4").tobytes()
            (folder / f"cifar10_{name}_{number}.aedat").write_bytes(b"#!AER-DAT2.0\r\n# made up\r\n" + events)
    return {}


WRITERS: dict[str, Callable[[Path, np.random.Generator], dict[str, Any]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagenet": _imagenet,
    "dvs_gesture": _dvs_gesture,
    "cifar10_dvs": _cifar10_dvs,
    "digits": _nothing,
    "event_digits": _nothing,
    "image_folder": _image_folder,
}


def _image(label: int, classes: int, size: int, generator: np.random.Generator) -> Any:
    """Noise, and stripes whose angle and colour tell the class: ``[size, size, 3]``, bytes."""
    angle = np.pi * label / classes
    y, x = np.mgrid[:size, :size] / size
    stripes = np.sin(2 * np.pi * 4 * (x * np.cos(angle) + y * np.sin(angle)))
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / classes + np.arange(3) / 3))
    image = 128 + 70 * stripes[..., None] * colour + generator.normal(0, 15, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def _rows(labels: list[int], classes: int, generator: np.random.Generator) -> Any:
    """Images as rows of CIFAR's files ``[N, 3072]``: all red, all green, all blue values."""
    images = np.stack([_image(label, classes, 32, generator) for label in labels])
    return images.transpose(0, 3, 1, 2).reshape(len(labels), -1)


def _pickle(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _jpegs(
    root: Path,
    splits: dict[str, int],
    classes: int,
    size: int,
    suffix: str,
    generator: np.random.Generator,
) -> None:
    image = require("PIL.Image", extra="train")
    for split, count in splits.items():
        for label in range(classes):
            folder = root / split / f"class_{label:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = _image(label, classes, size, generator)
                image.fromarray(pixels).save(folder / f"{i}.{suffix}", "JPEG", quality=95)


def _moving_bar(label: int, classes: int, generator: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    """Events (t, x, y, p) of a bar that crosses the sensor in the direction of its class: ON before it, OFF after."""
    angle = 2 * np.pi * label / classes
    t = np.sort(generator.integers(0, MICROSECONDS_PER_SAMPLE, EVENTS_PER_SAMPLE))
    p = generator.integers(0, 2, EVENTS_PER_SAMPLE)
    along = 40 * (2 * t / MICROSECONDS_PER_SAMPLE - 1) + 8 * p
    across = generator.uniform(-40, 40, EVENTS_PER_SAMPLE)
    x = 64 + along * np.cos(angle) - across * np.sin(angle)
    y = 64 + along * np.sin(angle) + across * np.cos(angle)
    return t, x.astype(int).clip(0, SENSOR - 1), y.astype(int).clip(0, SENSOR - 1), p


def _write_gestures(path: Path, generator: np.random.Generator) -> None:
    """One recording with its label file: the 11 gestures one after another, a packet each."""
    packets = []
    labels = ["class,startTime_usec,endTime_usec"]
    for label in range(11):
        start = (2 * label + 1) * MICROSECONDS_PER_SAMPLE
        t, x, y, p = _moving_bar(label, 11, generator)
        events = np.zeros(len(t), EVENT_TYPE)
        events["address"] = x << 17 | y << 2 | p << 1 | 1
        events["t"] = start + t
        header = np.array([8, 4, 0, len(t), len(t), len(t)], "<u4").tobytes()
        packets.append(np.array([1, 1], "<u2").tobytes() + header + events.tobytes())
        labels.append(f"{label + 1},{start},{start + MICROSECONDS_PER_SAMPLE}")
    first_lines = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: made up\r\n#!END-HEADER\r\n"
    path.write_bytes(first_lines + b"".join(packets))
    path.with_name(f"{path.stem}_labels.csv").write_text("\n".join(labels) + "\n")
