import errno
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from torchvision import transforms

from sltt_ext.data import CIFAR10DVSData, DVSGestureData, write_tiny
from sltt_ext.data.events import bytes_at_48_pixels
from sltt_ext.data.recordings import integrate_by_number
from sltt_ext.errors import ConfigurationError, DataError, SLTTWarning, WriteError

MODULES = {"dvs_gesture": DVSGestureData, "cifar10_dvs": CIFAR10DVSData}
THEIRS = {"dvs_gesture": ("dvs128_gesture", "DVS128Gesture"), "cifar10_dvs": ("cifar10_dvs", "CIFAR10DVS")}
T = 4


def gesture(root, **options):
    return DVSGestureData(root, time_steps=T, **{"batch_size": 4, **options})


def spikingjelly_data(name, root, monkeypatch, **options):
    """SpikingJelly's own way from the extracted files to frames, without the archives."""
    module, source = THEIRS[name]
    source = getattr(importlib.import_module(f"spikingjelly.datasets.{module}"), source)
    monkeypatch.setattr(source, "resource_url_md5", staticmethod(list))
    monkeypatch.setattr(np, "fromstring", np.frombuffer)  # 0.0.0.0.14 uses what numpy 2.3 took away
    (root / "download").mkdir(exist_ok=True)
    return source(str(root), data_type="frame", frames_number=T, split_by="number", **options)


@pytest.mark.usefixtures("spikingjelly_datasets")
@pytest.mark.parametrize(
    ("name", "train"), [("dvs_gesture", True), ("dvs_gesture", False), ("cifar10_dvs", None)]
)
def test_samples_are_those_of_spikingjelly(tmp_path, name, train, monkeypatch):
    options = {} if train is None else {"train": train}
    for root in ("ours", "theirs"):
        write_tiny(name, tmp_path / root)
    theirs = spikingjelly_data(name, tmp_path / "theirs", monkeypatch, **options)
    data = MODULES[name](tmp_path / "ours", time_steps=T)
    data.setup()
    ours = data._open(data._frames / ("" if train is None else "train" if train else "test"), None)
    names = [[Path(path).relative_to(tmp_path / root) for path, _ in samples]
             for root, samples in (("ours", ours.samples), ("theirs", theirs.samples))]  # fmt: skip
    assert names[0] == names[1]
    for (frames, label), (their_frames, their_label) in zip(ours, theirs):
        assert np.array_equal(frames, their_frames)
        assert label == their_label


@pytest.mark.usefixtures("spikingjelly_datasets")
def test_folders_that_spikingjelly_made_are_read(tmp_path, monkeypatch):
    write_tiny("dvs_gesture", tmp_path)
    theirs = spikingjelly_data("dvs_gesture", tmp_path, monkeypatch, train=False)
    ours = gesture(tmp_path).test_set
    assert len(ours) == len(theirs) == 11
    assert all(np.array_equal(frames, theirs[i][0]) for i, (frames, _) in enumerate(ours))


def test_gesture_batches(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    data = gesture(tmp_path)
    assert (data.num_classes, data.in_channels, data.time_steps, data.time_dim) == (11, 2, T, 1)
    sizes = [len(labels) for _, labels in data.train_dataloader()]
    assert sizes == [4] * 5  # 22 samples: the last two are dropped
    x, _ = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((4, T, 2, 128, 128), torch.float32)
    assert x.sum((1, 2, 3, 4)).tolist() == [600.0] * 4
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 11


def test_a_batch_larger_than_a_training_set_that_drops_the_last(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    with pytest.raises(ConfigurationError, match="batch_size=23 makes no batch of 22 training samples"):
        gesture(tmp_path, batch_size=23).train_dataloader()


def test_cifar10_dvs_is_split_by_number(tmp_path):
    write_tiny("cifar10_dvs", tmp_path)
    data = CIFAR10DVSData(tmp_path, time_steps=T, batch_size=40)
    assert (len(data.train_set), len(data.test_set)) == (30, 10)
    x, labels = next(iter(data.test_dataloader()))
    assert x.shape == (10, T, 2, 48, 48)
    assert labels.tolist() == list(range(10))


def published_transform(frames):
    """Frame by frame, as the published code does it."""
    steps = transforms.Compose([transforms.ToPILImage(), transforms.Resize(48), transforms.ToTensor()])
    return torch.stack([steps(frame) for frame in torch.from_numpy(frames)])


@pytest.mark.parametrize("rate", [0.05, 1.0, 100.0, 400.0])
def test_the_published_transform(rate):
    counts = np.random.default_rng(0).poisson(rate, (3, 2, 128, 128)).astype(np.float32)
    assert torch.equal(bytes_at_48_pixels(counts), published_transform(counts))


def test_frames_by_number():
    events = {"t": np.arange(11), "x": np.arange(11), "y": np.zeros(11, int), "p": np.arange(11) % 2}
    frames = integrate_by_number(events, 4)
    assert frames.sum((1, 2, 3)).tolist() == [2, 2, 2, 5]
    assert [frames[:, 0].sum(), frames[:, 1].sum()] == [6, 5]
    assert frames[3, :, 0, 6:11].tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match="11 events are too few for 12 frames: lower time_steps"):
        integrate_by_number(events, 12)
    with pytest.raises(ValueError, match="outside of 128 x 128"):
        integrate_by_number({**events, "x": events["x"] + 118}, 4)


@pytest.mark.parametrize("name", MODULES)
def test_an_absent_set(tmp_path, name):
    root = tmp_path / "there"
    with pytest.raises(DataError, match=rf"is not in {root}: download .* into {root}/download"):
        MODULES[name](root).train_dataloader()
    assert not root.exists()


@pytest.mark.parametrize("name", MODULES)
def test_time_steps_that_the_recordings_do_not_have(tmp_path, name):
    write_tiny(name, tmp_path)
    with pytest.raises(DataError, match="600 events are too few for 601 frames: lower time_steps"):
        MODULES[name](tmp_path, time_steps=601).setup()
    assert not list(tmp_path.glob("frames*"))


def test_a_corrupt_recording(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    path = tmp_path / "extract" / "DvsGesture" / "user02_led.aedat"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"on_corrupt='skip':\n  {path}: it ends in a packet"):
        gesture(tmp_path).setup()
    data = gesture(tmp_path, on_corrupt="skip")
    with pytest.warns(SLTTWarning, match=rf"skipped: {path}: it ends in a packet"):
        data.setup()
    assert len(data.train_set) == 11
    with pytest.raises(DataError, match=rf"were skipped .* delete .*events_np .*\n  {path}"):
        gesture(tmp_path).setup()


def test_a_recording_without_its_last_gesture(tmp_path):
    """Cut between two packets: the format has no number of them, but the labels tell."""
    write_tiny("dvs_gesture", tmp_path)
    path = tmp_path / "extract" / "DvsGesture" / "user24_led.aedat"
    path.write_bytes(path.read_bytes()[: -28 - 600 * 8])
    with pytest.raises(
        DataError, match=rf"{path}: it has no events from 21000000 to 22000000 us, where user24"
    ):
        gesture(tmp_path).setup()
    with pytest.warns(SLTTWarning, match="it has no events from"):
        gesture(tmp_path, on_corrupt="skip").setup()
    assert not list(tmp_path.glob("events_np/test/*/user24*"))


@pytest.mark.parametrize("on_corrupt", ["raise", "skip"])
@pytest.mark.parametrize("stage", ["events_np", f"frames_number_{T}_split_by_number"])
def test_a_full_disk_is_not_the_recordings_fault(tmp_path, monkeypatch, stage, on_corrupt):
    write_tiny("dvs_gesture", tmp_path)
    save = np.savez_compressed

    def fills_the_disk(target, **arrays):
        if stage in str(target):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(target, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fills_the_disk)
        with pytest.raises(
            WriteError, match=rf"{stage}.*npz cannot be written \(No space left .*free some space"
        ):
            gesture(tmp_path, on_corrupt=on_corrupt).setup()
    assert not list(tmp_path.glob(f"{stage}*"))
    assert len(gesture(tmp_path).test_set) == 11


def test_a_folder_without_permission(tmp_path, monkeypatch):
    write_tiny("dvs_gesture", tmp_path)

    def refuses(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(WriteError, match=r"events_np.unfinished cannot be written .* change its permissions"):
        gesture(tmp_path).setup()


def test_every_recording_corrupt(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    for path in tmp_path.rglob("*.aedat"):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"no sample for .*events_np can be read"):
        gesture(tmp_path, on_corrupt="skip").setup()


def test_a_class_that_gestures_do_not_have(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    path = tmp_path / "extract" / "DvsGesture" / "user24_led_labels.csv"
    path.write_text(path.read_text().replace("\n3,", "\n13,"))
    with pytest.raises(DataError, match=r"user24_led_labels.csv has the class 13, not one of 1 to 11"):
        gesture(tmp_path).setup()


@pytest.mark.parametrize("stage", ["events_np", f"frames_number_{T}_split_by_number"])
def test_a_corrupt_sample(tmp_path, stage):
    """Before frames are made of it, and in the middle of an epoch."""
    write_tiny("dvs_gesture", tmp_path)
    gesture(tmp_path).prepare_data()
    path = tmp_path / stage / "test" / "5" / "user24_led_0.npz"
    path.write_bytes(path.read_bytes()[:-30])
    if stage == "events_np":
        for frames in (tmp_path / f"frames_number_{T}_split_by_number").rglob("*.npz"):
            frames.unlink()
        frames.parents[2].rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{path}"):
        list(gesture(tmp_path).test_dataloader())
    with pytest.warns(SLTTWarning, match=rf"skipped: {path}"):
        batches = list(gesture(tmp_path, on_corrupt="skip").test_dataloader())
    assert sum(len(labels) for _, labels in batches) == 10


def test_frames_of_another_length(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    gesture(tmp_path).prepare_data()
    (tmp_path / f"frames_number_{T}_split_by_number").rename(tmp_path / "frames_number_5_split_by_number")
    with pytest.raises(DataError, match=r"frames of shape \[4, 2, 128, 128\], not \[5, 2, 128, 128\]"):
        _ = DVSGestureData(tmp_path, time_steps=5).test_set[0]


def test_frames_that_are_not_all_there(tmp_path):
    """As SpikingJelly 0.0.0.0.14 leaves them where it is interrupted, or cannot read a file."""
    write_tiny("dvs_gesture", tmp_path)
    gesture(tmp_path).prepare_data()
    next((tmp_path / f"frames_number_{T}_split_by_number").rglob("*.npz")).unlink()
    with pytest.raises(DataError, match=r"is incomplete, .*\.npz and 0 more are missing: delete it"):
        gesture(tmp_path).setup()


def test_a_conversion_that_spikingjelly_2_did_not_finish(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    (tmp_path / "events_np.building").touch()
    with pytest.raises(DataError, match=r"is incomplete: delete it and .*events_np.building"):
        gesture(tmp_path).setup()


def test_a_missing_class_folder(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    gesture(tmp_path).prepare_data()
    for stage in ("events_np", f"frames_number_{T}_split_by_number"):
        (tmp_path / stage / "train" / "4").rename(tmp_path / f"{stage} 4")
    with pytest.raises(DataError, match="has 10 classes, not 11"):
        gesture(tmp_path).setup()


def test_a_recording_of_another_name(tmp_path):
    write_tiny("cifar10_dvs", tmp_path)
    path = tmp_path / "extract" / "cat" / "cifar10_cat_0.aedat"
    path.rename(path.with_name("copy.aedat"))
    with pytest.raises(DataError, match=r"copy.npz is not named cifar10_CLASS_NUMBER"):
        CIFAR10DVSData(tmp_path).setup()
