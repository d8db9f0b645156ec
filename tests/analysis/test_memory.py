import sys
from functools import partial

import networks
import pytest
import torch
from spikingjelly.activation_based import functional
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import ActivationMeter, peak_activation_bytes


def bptt(net, x, target, time_steps):
    loss = sum(F.cross_entropy(net(x), target) for _ in range(time_steps)) / time_steps
    loss.backward()
    functional.reset_net(net)


def sltt(net, x, target, time_steps):
    net.zero_grad()
    sltt_ext.OnlineTrainer(net, F.cross_entropy, time_steps).forward_backward(x, target)


def test_counts_by_hand():
    x = torch.ones(256)
    with ActivationMeter() as meter:
        a = x + 1
        b = a.view(16, 16).t()  # shares a's storage
        a.mul_(2)
        c = b + 1
        assert meter.live_bytes == 2048
        del a, b
        assert meter.live_bytes == 1024
        d = c * 2 * 2
    assert meter.live_bytes == 2048
    assert meter.peak_bytes == 3072
    del c, d
    assert meter.live_bytes == 0


def test_a_storage_that_is_freed_runs_no_python():
    """Python drops an exception in a weak reference's callback, so that an interrupt there would be lost."""
    calls = []
    with ActivationMeter() as meter:
        y = torch.ones(256) + 1
        sys.setprofile(lambda frame, event, argument: calls.append(event) if event == "call" else None)
        del y
        sys.setprofile(None)
    assert meter.live_bytes == 0
    assert calls == []


def test_parameter_gradients_are_no_activations():
    net = torch.nn.Linear(64, 64, bias=False)
    x = torch.ones(1, 64)
    with ActivationMeter() as meter:
        net(x).sum().backward()
    counted = peak_activation_bytes(lambda: [net(x).sum().backward() for _ in range(3)], net)
    assert meter.live_bytes == net.weight.nbytes
    assert counted < 2 * net.weight.nbytes


def test_fake_tensors_count_as_real_ones_do():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def measure():
        net = sltt_ext.convert(networks.conv_net())
        x, target = torch.ones(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
        return peak_activation_bytes(lambda: sltt(net, x, target, 3), net)

    real = measure()
    with FakeTensorMode():
        fake = measure()
    assert fake == pytest.approx(real, rel=0.02)


def test_sltt_memory_does_not_grow_with_time():
    net = sltt_ext.convert(networks.conv_net())
    x, target = networks.images()
    short, long = (peak_activation_bytes(partial(sltt, net, x, target, steps), net) for steps in (1, 32))
    assert long <= 1.05 * short


def test_sltt_memory_is_a_quarter_of_bptts_on_spiking_resnet18():
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    net = networks.resnet18()
    with_bptt = peak_activation_bytes(lambda: bptt(net, x, target, 6), net)
    sltt_ext.convert(net)
    assert peak_activation_bytes(lambda: sltt(net, x, target, 6), net) <= 0.25 * with_bptt
