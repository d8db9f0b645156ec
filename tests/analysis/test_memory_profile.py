import networks
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from sltt_ext.analysis import memory_profile, peak_activation_bytes
from sltt_ext.bptt import BPTTTrainer
from sltt_ext.errors import ConfigurationError, InputError

FLOAT = 4


def small():
    return nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 2))


def test_peak_is_that_of_the_iteration():
    net = networks.conv_net()
    x, _ = networks.images()
    profile = memory_profile(net, x, ("bptt", "sltt"), (1, 4))
    trainer = BPTTTrainer(net, lambda output, _: output.mean(), 4)
    assert profile.peak_bytes("bptt", 4) == peak_activation_bytes(
        lambda: trainer.forward_backward(x, None), net
    )


def test_gradients_of_parameters_count_alike():
    """A network of almost nothing but weights: one copy of their gradients, and at most a second on its way."""
    net = nn.Sequential(
        layer.Linear(512, 512, bias=False), neuron.LIFNode(), layer.Linear(512, 512, bias=False)
    )
    weights = 2 * 512 * 512 * FLOAT
    for row in memory_profile(net, torch.rand(1, 512), ("bptt", "sltt"), (4,)).rows:
        assert weights < row.peak_bytes < 2.1 * weights


def test_memory_of_sltt_does_not_grow_and_that_of_bptt_does():
    x, _ = networks.images()
    profile = memory_profile(networks.conv_net(), x, ("bptt", "sltt", "sltt-1"), (2, 16))
    for method in ("sltt", "sltt-1"):
        assert profile.peak_bytes(method, 16) <= 1.05 * profile.peak_bytes(method, 2)
    assert profile.peak_bytes("bptt", 16) > 6 * profile.peak_bytes("bptt", 2)


@pytest.mark.parametrize(("method", "steps"), [("sltt", 1), ("bptt", 5)])
def test_layers_by_hand(method, steps):
    """The second linear layer keeps its input, 16 x 8 spikes of each step; the input itself does not count."""
    layers = memory_profile(small(), torch.rand(16, 4), method, (5,)).layers
    kept = {row.layer: row.saved_bytes for row in layers}
    by_output = kept["1"] + kept["2"]  # the spikes are saved by the neuron or by the layer after it
    assert by_output >= steps * 2 * 16 * 8 * FLOAT  # spikes, and a number for the surrogate's derivative
    assert by_output < (steps + 1) * 16 * 8 * FLOAT * (2 if method == "sltt" else 8)
    assert "0" not in kept


def test_fake_tensors_count_as_real_ones_do():
    x, _ = networks.images()
    real = memory_profile(networks.conv_net(), x, time_steps=(1, 3))
    fake = memory_profile(networks.conv_net(), tuple(x.shape), time_steps=(1, 3), fake=True)
    for expected, row in zip(real.rows, fake.rows):
        assert row.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.02)
    assert {row.layer for row in fake.layers} == {row.layer for row in real.layers}


def test_sizes_that_do_not_fit():
    profile = memory_profile(networks.resnet18(), (32768, 3, 224, 224), "bptt", (4,), fake=True)
    assert profile.peak_bytes("bptt", 4) > 1e12


def test_sequences_are_cut_to_each_number_of_steps():
    x_seq = torch.rand(16, 4, 4)
    profile = memory_profile(small(), x_seq, "sltt", (1, 4), time_dim=1)
    assert [row.time_steps for row in profile.rows] == [1, 4]
    with pytest.raises(InputError, match="fewer than 5 steps"):
        memory_profile(small(), x_seq, "sltt", (5,), time_dim=1)


def test_result_as_dataframe_and_plots():
    profile = memory_profile(small(), torch.rand(16, 4), time_steps=(1, 2))
    assert list(profile.to_dataframe().columns) == ["method", "time_steps", "peak_bytes"]
    assert set(profile.layers_to_dataframe()["method"]) == {"BPTT", "SLTT"}
    assert "(MB)" in profile.plot().axes[0].get_ylabel()
    assert "(MB)" in profile.plot_layers().axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "ottt"}, ConfigurationError, "method must be"),
        ({"time_steps": ()}, ConfigurationError, "at least one"),
        ({"time_steps": (0,)}, ConfigurationError, "positive integer"),
        ({"x": (16, 4)}, InputError, "with fake=True a shape"),
    ],
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        memory_profile(**{"net": small(), "x": torch.rand(16, 4), **change})
