"""Whole networks on a CUDA device, and real memory.

What does not measure memory runs on the CPU as well, through the same kernels.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import sltt_ext
from sltt_ext.functional import multi_step_lif

pytest.importorskip("spikingjelly")

import networks
import oracle
from devices import needs_cuda


@pytest.mark.parametrize("v_reset", [0.0, None])
def test_neuron_on_cuda_equals_the_cpu(v_reset, device, backend):
    x, weight = torch.randn(6, 1000), torch.rand(6, 1000)
    results = []
    for where, used in (("cpu", "torch"), (device, backend)):
        x_seq = x.detach().clone().to(where).requires_grad_()
        s_seq, v = multi_step_lif(x_seq, tau=2.0, v_reset=v_reset, backend=used)
        (s_seq * weight.to(where)).sum().backward()
        results.append([tensor.detach().cpu() for tensor in (s_seq, v, x_seq.grad)])
    (s_cpu, v_cpu, grad_cpu), (s_cuda, v_cuda, grad_cuda) = results
    assert torch.equal(s_cpu, s_cuda)
    torch.testing.assert_close(v_cpu, v_cuda)
    assert oracle.relative_error(grad_cuda, grad_cpu) < 1e-6


def test_trainer_on_cuda(device, backend):
    net = networks.conv_net().to(device)
    x, target = (tensor.to(device) for tensor in networks.images())
    expected = oracle.sltt_gradients(net, [x] * 6, target, F.cross_entropy)
    converted = sltt_ext.convert(copy.deepcopy(net), backend=backend)
    sltt_ext.OnlineTrainer(converted, F.cross_entropy, 6).forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(converted), expected) < 1e-5


@needs_cuda
def test_allocated_memory_does_not_grow_with_time():
    x, target = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
    net = sltt_ext.convert(networks.resnet18().cuda())
    peaks = {}
    for time_steps in (1, 32):
        net.zero_grad()
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, time_steps)
        online.forward_backward(x, target)
        net.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        online.forward_backward(x, target)
        peaks[time_steps] = torch.cuda.max_memory_allocated() - before
    gradients = sum(parameter.nbytes for parameter in net.parameters())
    assert peaks[32] <= 1.05 * peaks[1] + gradients
