import sys

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
from sltt_ext.data import DigitsData, EventDigitsData
from sltt_ext.errors import ConfigurationError, DataError, MissingDependencyError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a positive integer, got 2.0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"on_corrupt": "ignore"}, "on_corrupt must be 'raise' or 'skip', got 'ignore'"),
        ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
    ],
    ids=str,
)
def test_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        DigitsData(**options)


def test_time_steps():
    with pytest.raises(ConfigurationError, match="time_steps must be a positive integer, got 0"):
        EventDigitsData(time_steps=0)


def test_a_class_count_that_differs_from_the_sets():
    with pytest.raises(DataError, match=r"Digits at \. has 10 classes, not 11: give the network 10 outputs"):
        DigitsData(num_classes=11).setup()


@pytest.mark.parametrize(
    ("data", "shape"), [(DigitsData(), (1, 8, 8)), (EventDigitsData(time_steps=4), (4, 2, 16, 16))]
)
def test_the_embedded_sets(data, shape):
    images = torch.cat([x for x, _ in data.train_dataloader()])
    assert images.shape == (1297, *shape)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 500
    assert (data.in_channels, data.num_classes) == (shape[-3], 10)
    assert (data.time_steps, data.time_dim) == ((4, 1) if len(shape) == 4 else (None, None))


def test_evaluation_draws_no_random_number_of_training():
    state = torch.get_rng_state()
    assert len(list(DigitsData().test_dataloader())) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_training_set_is_shuffled():
    data = DigitsData()
    assert torch.equal(next(iter(data.val_dataloader()))[1], next(iter(data.test_dataloader()))[1])
    first, second = (next(iter(data.train_dataloader()))[1] for _ in range(2))
    assert not torch.equal(first, second)


def test_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    for name in [name for name in sys.modules if name.startswith("sltt_ext.data.")]:
        if name.rpartition(".")[2] not in ("digits", "event_digits"):
            monkeypatch.delitem(sys.modules, name)
    import sltt_ext.data

    assert len(sltt_ext.data.load_digits().test_labels) == 500
    with pytest.raises(MissingDependencyError, match=r"pip install 'sltt-ext\[train\]'"):
        _ = sltt_ext.data.DigitsData


def test_public_names_exist():
    import sltt_ext.data

    assert all(hasattr(sltt_ext.data, name) for name in sltt_ext.data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'MNISTData'"):
        _ = sltt_ext.data.MNISTData
