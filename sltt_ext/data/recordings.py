"""Event recordings, from the downloaded archives to frames, in SpikingJelly's folders.

A set's folder has what SpikingJelly (0.0.0.0.14 and 2.0.0) keeps there, each made from the one before it::

    download/                          the archives, as published
    extract/                           what is in them
    events_np/                         the events of each sample, .npz
    frames_number_T_split_by_number/   T frames [T, 2, 128, 128] of each sample, .npz

Names and contents are those of SpikingJelly's ``DVS128Gesture`` and ``CIFAR10DVS``, so folders that these made are
read as they are, and theirs read ours. What is made here appears when it is complete, and a file that cannot be read
is named: 0.0.0.0.14 leaves it out without a word, and 2.0.0 stops at it without its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sltt_ext.data.aedat import Events, read_aedat2, read_aedat3
from sltt_ext.data.archives import CIFAR10_DVS, ArchivedSet, extracted
from sltt_ext.data.corrupt import NamedReader
from sltt_ext.errors import DataError, warn
from sltt_ext.files import writing

__all__ = [
    "check_frames",
    "cifar10_dvs_events",
    "gesture_events",
    "integrate_by_number",
    "prepare_frames",
    "read_frames",
]

SIZE = 128
"""Height and width of the sensor, in pixels."""
SKIPPED = "skipped.txt"
Damaged = list[str]
"""``path: what is wrong with it``."""
Convert = Callable[[Path, Path], Damaged]
"""``(folder with the files of the archives, empty folder for the events of each sample) -> what is damaged``."""


def prepare_frames(
    root: Path, time_steps: int, *, source: ArchivedSet, convert: Convert, download: bool, on_corrupt: str
) -> None:
    """Make what is missing, up to the frames.

    Args:
        root: The set's folder.
        time_steps: T.
        source: Its archives.
        convert: Makes ``events_np`` of what was in them.
        download: Whether to download them where they are missing.
        on_corrupt: ``"raise"``, or ``"skip"`` what cannot be read.

    Raises:
        DataError: If the set is absent, or a file cannot be read and ``on_corrupt`` is ``"raise"``.
        WriteError: If a folder cannot be written; what was made of it is deleted.
        ConfigurationError: If ``download`` is asked for, and no program may do it.
    """
    events, frames = _folders(root, time_steps)
    for folder in (events, frames):
        if (marker := folder.with_name(f"{folder.name}.building")).exists():  # SpikingJelly 2's
            raise DataError(f"{folder} is incomplete: delete it and {marker}, and it will be made again")
    if not events.is_dir():
        extract = extracted(source, root, download)
        _make(events, lambda folder: convert(extract, folder), on_corrupt)
    if not frames.is_dir():
        _make(frames, lambda folder: _integrate_all(events, folder, time_steps), on_corrupt)


def check_frames(root: Path, time_steps: int, *, on_corrupt: str) -> Path:
    """The folder of the frames, if each sample has its frames or is known to be damaged.

    Raises:
        DataError: If the frames are incomplete, or samples were skipped and ``on_corrupt`` is ``"raise"``.
    """
    events, frames = _folders(root, time_steps)
    skipped = [line for folder in (events, frames) for line in _lines(folder / SKIPPED)]
    known = {line.partition(": ")[0] for line in skipped}
    without = _samples(events) - _samples(frames)
    if lost := sorted(name for name in without if str(events / name) not in known):
        raise DataError(
            f"{frames} is incomplete, {lost[0]} and {len(lost) - 1} more are missing: delete it, and it will be made "
            "again"
        )
    if skipped and on_corrupt == "raise":
        advice = f"restore them and delete {events} and {frames}, or pass on_corrupt='skip'"
        raise DataError("\n  ".join([f"recordings were skipped as they cannot be read; {advice}:", *skipped]))
    for line in skipped:
        warn(f"skipped: {line}")
    return frames


def read_frames(path: str, time_steps: int) -> Any:
    """The frames of a sample, event counts ``[T, 2, 128, 128]``, float32."""
    with np.load(path) as archive:
        frames = archive["frames"].astype(np.float32)
    if frames.shape != (time_steps, 2, SIZE, SIZE):
        raise ValueError(f"frames of shape {list(frames.shape)}, not {[time_steps, 2, SIZE, SIZE]}")
    return frames


def integrate_by_number(events: Events, time_steps: int) -> Any:
    """Event counts ``[T, 2, 128, 128]``: floor(N / T) events in each frame, the rest in the last.

    Raises:
        ValueError: If there are fewer than T events, or some are outside of the sensor.
    """
    number = len(events["t"])
    if number < time_steps:
        raise ValueError(f"{number} events are too few for {time_steps} frames: lower time_steps")
    x, y = (events[key].astype(np.int64) for key in "xy")
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= SIZE:
        raise ValueError(f"events outside of {SIZE} x {SIZE} pixels")
    frame = np.minimum(np.arange(number) // (number // time_steps), time_steps - 1)
    place = ((frame * 2 + (events["p"] != 0)) * SIZE + y) * SIZE + x
    shape = (time_steps, 2, SIZE, SIZE)
    return np.bincount(place, minlength=int(np.prod(shape))).reshape(shape).astype(np.float32)


def gesture_events(extract: Path, events: Path) -> Damaged:
    """Cut DVS128 Gesture's recordings into samples: one for each line of their label files."""
    folder = extract / "DvsGesture"
    trials = []
    for split in ("train", "test"):
        for label in range(11):
            (events / split / str(label)).mkdir(parents=True)
        names = NamedReader(_text)(folder / f"trials_to_{split}.txt").split()
        trials += [(folder / name, partial(_cut_gestures, samples=events / split)) for name in names]
    return _in_parallel(trials)


def cifar10_dvs_events(extract: Path, events: Path) -> Damaged:
    """The events of each of CIFAR10-DVS's recordings."""
    tasks = []
    for archive in CIFAR10_DVS.archives:
        samples = events / archive.inside
        samples.mkdir()
        paths = sorted((extract / archive.inside).glob("*.aedat"))
        tasks += [(path, partial(_convert_aedat2, target=samples / f"{path.stem}.npz")) for path in paths]
    return _in_parallel(tasks)


def _folders(root: Path, time_steps: int) -> tuple[Path, Path]:
    return root / "events_np", root / f"frames_number_{time_steps}_split_by_number"


def _samples(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.npz")}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _make(folder: Path, write: Callable[[Path], Damaged], on_corrupt: str) -> None:
    """Have ``folder`` written under another name, and rename it when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(folder):
            unfinished.mkdir(parents=True)
            damaged = write(unfinished)
            if damaged and on_corrupt == "raise":
                message = "recordings that cannot be read; restore them, or pass on_corrupt='skip':"
                raise DataError("\n  ".join([message, *damaged]))
            if not _samples(unfinished):
                raise DataError("\n  ".join([f"no sample for {folder} can be read:", *damaged]))
            if damaged:
                (unfinished / SKIPPED).write_text("".join(f"{line}\n" for line in damaged))
            unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _in_parallel(tasks: Iterable[tuple[Path, Callable[[str], None]]]) -> Damaged:
    """What is wrong with the files that their task could not read."""

    def complaint(task: tuple[Path, Callable[[str], None]]) -> list[str]:
        path, work = task
        try:
            NamedReader(work)(path)
        except DataError as error:
            return [f"{path}: {' '.join(str(error.__cause__).split())}"]
        return []

    with ThreadPoolExecutor() as threads:
        return [line for lines in threads.map(complaint, tasks) for line in lines]


def _text(path: str) -> str:
    return Path(path).read_text()


def _cut_gestures(path: str, *, samples: Path) -> None:
    recording = Path(path)
    events = read_aedat3(recording)
    labels = recording.with_name(f"{recording.stem}_labels.csv")
    count = [0] * 11
    gestures = []
    for label, start, end in np.loadtxt(labels, np.int64, delimiter=",", skiprows=1, ndmin=2):
        if not 1 <= label <= 11:
            raise ValueError(f"{labels.name} has the class {label}, not one of 1 to 11")
        during = (events["t"] >= start) & (events["t"] < end)
        if not during.any():
            raise ValueError(f"it has no events from {start} to {end} us, where {labels.name} has a gesture")
        gestures.append((samples / str(label - 1) / f"{recording.stem}_{count[label - 1]}.npz", during))
        count[label - 1] += 1
    for target, during in gestures:
        _save(target, **{key: values[during] for key, values in events.items()})


def _convert_aedat2(path: str, *, target: Path) -> None:
    _save(target, **read_aedat2(path))


def _save(target: Path, **arrays: Any) -> None:
    """Write ``target``. It needs no flush to the disk: the format has checksums, and what reads it heeds them."""
    with writing(target):
        np.savez_compressed(target, **arrays)


def _integrate_all(events: Path, frames: Path, time_steps: int) -> Damaged:
    """The frames of each sample, in the same folders."""
    tasks = []
    for path in sorted(events.rglob("*")):
        target = frames / path.relative_to(events)
        if path.is_dir():
            target.mkdir()
        elif path.suffix == ".npz":
            tasks.append((path, partial(_integrate, target=target, time_steps=time_steps)))
    return _in_parallel(tasks)


def _integrate(path: str, *, target: Path, time_steps: int) -> None:
    with np.load(path) as archive:
        events = {key: archive[key] for key in ("t", "x", "y", "p")}
    if len({len(values) for values in events.values()}) != 1:
        raise ValueError("t, x, y and p are of different lengths")
    _save(target, frames=integrate_by_number(events, time_steps))
