import copy
from dataclasses import replace

import accuracy
import accuracy_causes
import oracle
import paired
import pytest
import readout
import torch
from peers.rate_based import RateBasedTrainer, RateLIFNode, rate_gradients
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext


def small_set(samples=12):
    """Whose images are noisy anew each time, as crops and flips make them."""
    images, labels = torch.randn(samples, 1, 8, 8), torch.arange(samples) % 10

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return samples

        def __getitem__(self, i):
            return images[i] + torch.randn(1, 8, 8), int(labels[i])

    return Noisy()


@pytest.mark.filterwarnings("ignore:chunk")
def test_all_methods_have_the_same_weights_and_batches(monkeypatch):
    setting = replace(accuracy.SETTINGS["digits"], epochs=2, batch_size=4)
    data, seen, make = small_set(), {}, accuracy.trainer

    def watched(net, method, *options):
        online = make(net, method, *options)
        own = seen[method] = [torch.cat([parameter.detach().flatten() for parameter in net.parameters()])]
        gradients = online.forward_backward
        online.forward_backward = lambda x, target: (own.append(x.flatten()), gradients(x, target))
        return online

    monkeypatch.setattr(accuracy, "trainer", watched)
    for method in accuracy.METHODS:
        accuracy.run(setting, method, "mean", 3, data, data)
    first = seen["BPTT"]
    assert len(first) == 1 + 2 * 3
    for own in seen.values():
        assert all(map(torch.equal, own, first))


def batch_and_network(time_dim):
    torch.manual_seed(0)
    x = torch.randn(*((3, 4) if time_dim else (3,)), 1, 8, 8)
    return x, torch.arange(3), accuracy.small_network(1, (8, 8), 8)


@pytest.mark.filterwarnings("ignore:chunk")
@pytest.mark.parametrize("time_dim", [None, 1])
def test_a_window_of_all_steps_is_bptt(time_dim):
    x, target, net = batch_and_network(time_dim)
    found = []
    for method in ("BPTT", "window 4", "window 2"):
        own = copy.deepcopy(net)
        accuracy.trainer(own, method, 4, time_dim).forward_backward(x, target)
        found.append(oracle.gradients(own))
    assert oracle.relative_error(found[1], found[0]) < 1e-6
    assert oracle.relative_error(found[2], found[0]) > 1e-4


@pytest.mark.parametrize("time_dim", [None, 1])
def test_neurons_of_rates_fire_as_the_others(time_dim):
    x, target, net = batch_and_network(time_dim)
    own = copy.deepcopy(net)
    bptt, rates = (
        accuracy.trainer(each, method, 4, time_dim) for each, method in ((net, "BPTT"), (own, "rate-based"))
    )
    for online in (bptt, rates):
        online.forward_backward(x, target)
    assert any(isinstance(module, RateLIFNode) for module in own.modules())
    for name, buffer in net.named_buffers():
        assert torch.allclose(buffer, own.get_buffer(name), atol=1e-6), name
    assert torch.allclose(bptt.predict(x), rates.predict(x), atol=1e-6)


def test_the_trainer_of_rates_has_their_gradient():
    x, target, net = batch_and_network(None)
    own = copy.deepcopy(net)
    trainer = RateBasedTrainer(net, F.cross_entropy, 4)
    expected = copy.deepcopy(net)
    result = trainer.forward_backward(x, target)
    loss = rate_gradients(expected, torch.stack([x] * 4), lambda output: F.cross_entropy(output, target), 1)
    assert torch.allclose(result.loss, loss)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(expected)) < 1e-5
    (node,) = {(m.decay, m.detach_reset) for m in net.modules() if isinstance(m, RateLIFNode)}
    (same,) = {(1 - 1 / m.tau, m.detach_reset) for m in own.modules() if isinstance(m, neuron.LIFNode)}
    assert node == same


def test_an_interval_is_students():
    """Of 1, 2, 3, 4 and 5 by hand: a standard deviation of sqrt(2.5), a quantile of 2.776."""
    found = paired.interval([1, 2, 3, 4, 5])
    assert found == pytest.approx((3, 2.776 * (2.5 / 5) ** 0.5), abs=1e-3)
    assert not found.holds_zero
    assert paired.interval([-1, 0, 1]).holds_zero
    assert str(paired.interval([-0.002, 0.001])) == "+0.00 ± 0.02"


def test_differences_are_of_the_same_seed():
    accuracies = {"BPTT": {"0": 0.5, "1": 0.9, "3": 0.1}, "SLTT": {"1": 0.8, "0": 0.6, "2": 0.7}}
    rows = [
        {"method": method, "seed": seed, "test_accuracy": str(value)}
        for method, by_seed in accuracies.items()
        for seed, value in by_seed.items()
    ]
    found = paired.paired(rows)["SLTT"]
    assert found.accuracies == pytest.approx((80, 60))
    assert found.differences == pytest.approx((-10, 10))
    assert found.baseline_mean == pytest.approx(70)


@pytest.mark.parametrize("label", accuracy_causes.VARIANTS)
def test_a_variant_has_bptts_gradient_by_a_window_of_all_steps(label):
    """Of the network with its neurons as they were before, in a loop of its own."""
    variant = accuracy_causes.VARIANTS[label]
    net = variant.network(0)
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    by_hand = sltt_ext.revert(copy.deepcopy(net))
    functional.reset_net(by_hand)
    T = accuracy_causes.SETTING.time_steps
    output_seq = by_hand(x.expand(T, *x.shape)) if variant.norms_over_time else [by_hand(x) for _ in range(T)]
    loss_fn = sltt_ext.CrossEntropyMSELoss()
    if variant.loss_on == "mean":
        loss = loss_fn(sum(output_seq) / T, target)
    else:
        loss = sum(loss_fn(output, target) for output in output_seq) / T
    loss.backward()
    expected = oracle.gradients(by_hand)
    actual, sltt = (accuracy_causes.gradient(net, variant, bptt, (x, target)) for bptt in (True, False))
    assert oracle.relative_error([actual], [torch.cat([each.flatten() for each in expected])]) < 1e-5
    assert oracle.relative_error([sltt], [actual]) > 1e-3
    assert {module.tau for module in net.modules() if isinstance(module, neuron.LIFNode)} == {variant.tau}


def test_the_same_network_is_read_from_spikes_and_from_membranes():
    class Two(nn.Module):
        """Spikes for the first class, potentials for the second."""

        def forward(self, x):
            return F.one_hot(torch.zeros(len(x)).long(), 10), F.one_hot(torch.ones(len(x)).long(), 10)

    found = readout.accuracies(Two(), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 1]))
    assert found == {"accuracy_by_spikes": 0.25, "accuracy_by_membranes": 0.75}
