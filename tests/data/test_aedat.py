import numpy as np
import pytest

from sltt_ext.data.aedat import read_aedat2, read_aedat3

pytest.importorskip("PIL")
from sltt_ext.data.tiny import write_tiny


@pytest.fixture
def gesture(tmp_path):
    write_tiny("dvs_gesture", tmp_path)
    return tmp_path / "extract" / "DvsGesture" / "user01_led.aedat"


@pytest.fixture
def cifar10_dvs(tmp_path):
    write_tiny("cifar10_dvs", tmp_path)
    return tmp_path / "extract" / "ship" / "cifar10_ship_0.aedat"


OF_8_BYTES, OF_4_BYTES = (np.array([size, 4, 0, 600], "<u4").tobytes() for size in (8, 4))


def same(actual, expected):
    return all(np.array_equal(actual[key], expected[key]) for key in "txyp")


def test_aedat3_as_spikingjelly_reads_it(gesture, spikingjelly_datasets):
    assert same(read_aedat3(gesture), spikingjelly_datasets.load_aedat_v3(str(gesture)))


def test_other_packets_and_late_timestamps(gesture, spikingjelly_datasets):
    special = np.array([0, 0], "<u2").tobytes() + np.array([8, 4, 0, 1, 1, 1], "<u4").tobytes() + bytes(8)
    late = np.array([1, 1], "<u2").tobytes() + np.array([8, 4, 3, 1, 1, 1], "<u4").tobytes() + bytes(8)
    gesture.write_bytes(gesture.read_bytes() + special + late)
    events = read_aedat3(gesture)
    assert same(events, spikingjelly_datasets.load_aedat_v3(str(gesture)))
    assert events["t"][-1] == 3 << 31


def test_aedat2_as_spikingjelly_reads_it(cifar10_dvs, spikingjelly_datasets, monkeypatch):
    from spikingjelly.datasets import cifar10_dvs as module

    if hasattr(module, "_load_origin_data"):
        expected = module._load_origin_data(cifar10_dvs)
    else:
        monkeypatch.setattr(np, "fromstring", np.frombuffer)  # 0.0.0.0.14 uses what numpy 2.3 took away
        expected = module.CIFAR10DVS.load_origin_data(str(cifar10_dvs))
    assert same(read_aedat2(cifar10_dvs), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-3], "ends in a packet, 3 bytes before"),
        (lambda content: content[:-8], "ends in a packet, 8 bytes before"),
        (lambda content: content[: -8 * 599], "ends in a packet, 4792 bytes before"),
        (lambda content: content.replace(OF_8_BYTES, OF_4_BYTES, 1), "has events of 4 bytes, not 8"),
        (lambda content: content[: content.index(b"END-HEADER\r\n") + 20], "ends in the header of a packet"),
        (lambda content: content[: content.index(b"END-HEADER\r\n") + 12], "has no events"),
        (lambda content: b"#", "subsection not found"),
    ],
    ids=["in an event", "between events", "after one event", "size", "header", "empty", "comment"],
)
def test_damaged_aedat3(gesture, damage, message):
    gesture.write_bytes(damage(gesture.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_aedat3(gesture)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"#!AER-DAT2.0\r\n" + bytes(12), "ends in an event"), (b"#!AER-DAT2.0\r\n", "has no events")],
    ids=["event", "empty"],
)
def test_damaged_aedat2(tmp_path, content, message):
    path = tmp_path / "damaged.aedat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_aedat2(path)
