"""What kernels return is nobody else's memory: users may change it, and their inputs, in place."""

import itertools

import pytest
import torch

from sltt_ext.functional import multi_step_if, multi_step_leaky, multi_step_lif, multi_step_plif
from sltt_ext.functional.lif_operator import lif_settings
from sltt_ext.kernels import selection
from sltt_ext.kernels.lif import LIF
from sltt_ext.surrogate import Surrogate

NEURONS = {
    "if": multi_step_if,
    "if charged": lambda x, **options: multi_step_if(x, charged=True, **options),
    "lif": lambda x, **options: multi_step_lif(x, v_reset=None, **options),
    "plif": lambda x, **options: multi_step_plif(x, torch.tensor(0.3, device=x.device), **options),
    "lif through time": lambda x, **options: multi_step_lif(x, through_time=True, **options),
    "leaky through time": lambda x, **options: multi_step_leaky(x, beta=0.9, through_time=True, **options),
    "leaky": lambda x, **options: multi_step_leaky(x, beta=0.9, **options),
    "leaky at once": lambda x, **options: multi_step_leaky(x, beta=0.9, reset_delay=False, **options),
}
CHANGES = {
    "out += identity": lambda s, x: s.__iadd__(x),
    "relu": lambda s, x: torch.nn.functional.relu(s, inplace=True),
    "mul": lambda s, x: s.mul_(3),
    "view": lambda s, x: s.view(-1).sub_(0.5).view(s.shape),
}


@pytest.fixture(params=["torch", "cupy", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    if request.param == "cupy":
        import host

        host.register(monkeypatch)
    return request.param


def neurons(backend):
    return [(name, run) for name, run in NEURONS.items() if backend != "inductor" or "leaky" not in name]


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_spikes_may_be_changed_in_place(change, single_step, backend):
    for neuron, run in neurons(backend):
        gradients = []
        for in_place in (False, True):
            torch.manual_seed(0)
            x = (2 * torch.randn(3, 40)).requires_grad_()
            s, _ = run(x, single_step=single_step, backend=backend)
            changed = CHANGES[change](s if in_place else s.clone(), x.detach().square())
            (changed * torch.linspace(-1, 2, 120).view(3, 40)).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients), neuron


@pytest.mark.parametrize("single_step", [True, False])
def test_the_input_may_be_changed_in_place(single_step, backend):
    for neuron, run in neurons(backend):
        gradients = []
        for change in (0.0, 1.0):
            torch.manual_seed(0)
            leaf = (2 * torch.randn(1, 40)).requires_grad_()
            x = leaf * 1
            s, v = run(x, single_step=single_step, backend=backend)
            x.add_(change)
            (s.sum() + v.sum()).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients), neuron


def test_no_output_shares_memory(backend):
    kernels = selection._REGISTERED[backend].kernels[LIF]
    kinds = {}, {"charged": True}, {"through_time": True}
    every = [
        *itertools.product(kinds, (0.0, torch.zeros(40)), (None, 0.0), (0.0, 1.0), (1, 3), (False, True))
    ]
    # Inductor compiles each: a step of 5 takes some of every kind
    for kind, start, v_reset, v_threshold, time_steps, save in every[:: 5 if backend == "inductor" else 1]:
        settings = lif_settings(
            v_threshold=v_threshold, v_reset=v_reset, detach_reset=False, surrogate=Surrogate(), **kind
        )
        x_seq = torch.randn(time_steps, 40)
        outputs = kernels.forward(x_seq, start, None, settings, save, False)
        given = [x_seq, start] if isinstance(start, torch.Tensor) else [x_seq]
        memory = [tensor.untyped_storage().data_ptr() for tensor in (*given, *outputs) if tensor.numel()]
        assert len(set(memory)) == len(memory), settings
        assert not any(output._is_view() for output in outputs)
