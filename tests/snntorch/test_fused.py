"""What the fused Leaky neuron says of itself: which backends run it, and which of its outputs are spikes."""

import copy

import pytest
import snntorch
import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import BackendError
from sltt_ext.kernels.inductor_backend import InductorBackend
from sltt_ext.snntorch import MultiStep


class LouderWhereInhibited(snntorch.Leaky):
    def fire_inhibition(self, batch_size, mem):
        return 3 * super().fire_inhibition(batch_size, mem)


class Shifted(snntorch.Leaky):
    """Fires something else than zeros and ones."""

    def fire(self, mem):
        return super().fire(mem) + 0.5


def make(cls=snntorch.Leaky, **settings):
    return cls(beta=0.9, init_hidden=True, **settings)


NEURONS = {
    "plain": make,
    "graded": lambda: make(graded_spikes_factor=0.5),
    "graded, one dimension": lambda: make(graded_spikes_factor=torch.tensor([0.5])),
    "graded for each": lambda: make(graded_spikes_factor=torch.linspace(0.5, 2, 8)),
    "inhibition": lambda: make(inhibition=True, graded_spikes_factor=0.5),
    "own inhibition": lambda: make(LouderWhereInhibited, inhibition=True),
    "own fire": lambda: make(Shifted, graded_spikes_factor=0.5),
    "quantised": lambda: make(state_quant=lambda mem: mem.round(), graded_spikes_factor=0.5),
}


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_said_to_be_spikes_is_zero_or_the_factor(name, dtype):
    neuron = sltt_ext.convert(NEURONS[name]()).to(dtype)
    fired = 0
    for _ in range(4):
        output = neuron(3 * torch.rand(4, 8, dtype=dtype))
        if (said := neuron.spikes(output)) is not None:
            spikes, factor = said
            assert spikes is output
            assert torch.equal(spikes, spikes.bool().to(spikes.dtype) * factor)
            fired += spikes.count_nonzero().item()
    fused = dtype == torch.float32 and name in ("plain", "graded", "graded, one dimension")
    assert (fired > 0) == fused


def test_nothing_is_said_of_a_step_by_the_generic_rule_after_a_fused_one():
    neuron = sltt_ext.convert(make(graded_spikes_factor=0.5))
    assert neuron.spikes(neuron(torch.ones(2, 8))) is not None
    neuron.inhibition = True
    assert neuron.spikes(neuron(torch.ones(2, 8))) is None


def test_the_factor_is_that_of_the_step():
    neuron = sltt_ext.convert(make(graded_spikes_factor=0.5, learn_graded_spikes_factor=True))
    _, factor = neuron.spikes(neuron(torch.ones(2, 8)))
    with torch.no_grad():
        neuron.graded_spikes_factor.fill_(7.0)
    assert factor.item() == 0.5
    assert "_sltt_fused" not in vars(sltt_ext.revert(neuron))


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("multi_step", [False, True])
def test_packed_spikes_change_no_gradient(name, multi_step):
    torch.manual_seed(0)
    net = sltt_ext.convert(nn.Sequential(nn.Linear(6, 8), NEURONS[name](), nn.Linear(8, 3)))
    with torch.no_grad():
        net[0].weight.mul_(6)
    if multi_step:
        net = MultiStep(net)
    x, target = 2 * torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    gradients = []
    for pack_spikes in (False, True):
        run = copy.deepcopy(net)
        chunk = 4 if multi_step else 1
        trainer = sltt_ext.OnlineTrainer(run, F.cross_entropy, 4, pack_spikes=pack_spikes, chunk=chunk)
        trainer.forward_backward(x, target)
        gradients.append([parameter.grad for parameter in run.parameters()])
    for packed, plain in zip(*gradients, strict=True):
        assert torch.equal(packed, plain)


@pytest.fixture
def _working_compiler(monkeypatch):
    monkeypatch.setattr(InductorBackend, "problem", lambda self, device=None: None)


@pytest.mark.usefixtures("_working_compiler")
def test_a_backend_that_does_not_run_a_neuron_is_refused_before_anything_changes():
    net = nn.Sequential(nn.Linear(3, 3), make(), nn.Sequential(make(), snntorch.Lapicque(beta=0.9)))
    with pytest.raises(BackendError) as caught:
        sltt_ext.convert(net, backend="inductor")
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["1", "2.0"]
    assert all("backend='inductor' does not run snnTorch's Leaky" in line for line in lines)
    assert type(net[1]) is type(net[2][0]) is snntorch.Leaky
    assert not sltt_ext.is_converted(net)


@pytest.mark.usefixtures("_working_compiler")
def test_a_backend_is_refused_for_neurons_that_are_converted_already():
    net = sltt_ext.convert(nn.Sequential(make()), backend="torch")
    with pytest.raises(BackendError, match="nothing was converted"):
        sltt_ext.convert(net, backend="inductor")
    assert net[0].sltt_backend == "torch"


@pytest.mark.usefixtures("_working_compiler")
@pytest.mark.parametrize(
    "neuron",
    [
        lambda: snntorch.Lapicque(beta=0.9, init_hidden=True),
        lambda: make(inhibition=True),
        lambda: make(Shifted),
        lambda: make(spike_grad=lambda u: (u > 0).float()),
    ],
    ids=["Lapicque", "inhibition", "own fire", "own surrogate"],
)
def test_the_generic_rule_needs_no_backend(neuron):
    net = sltt_ext.convert(nn.Sequential(neuron()), backend="inductor")
    assert net(torch.ones(2, 8)).shape == (2, 8)
