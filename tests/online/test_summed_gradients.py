"""Gradients of several steps added up at once: the same bits as autograd's, and autograd's own where somebody looks."""

import copy

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sltt_ext
from sltt_ext.online import launching, summed_gradients

T = 4
TARGET = torch.tensor([0, 1, 2, 0])


class Shared(nn.Module):
    """One weight at three places: in front of the first neuron, between two, and read by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.first = layer.Linear(6, 6), layer.BatchNorm1d(6), neuron.LIFNode()
        self.second, self.head = neuron.LIFNode(), layer.Linear(6, 3)

    def forward(self, x):
        s = self.second(2 * self.norm(self.fc(self.first(self.fc(x)))))
        return self.head(s) + self.fc.weight[:3].sum(1)


class Embedded(nn.Module):
    """Gradients that are sparse, and one that is not laid out as its parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.neuron = nn.Embedding(6, 8, sparse=True), neuron.LIFNode()
        self.head = layer.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(3, 4).t())

    def forward(self, x):
        s = self.neuron(4 * self.table((2 * x[:, :2]).long()).mean(1))
        return self.head(s) * self.scale.mean()


class Checkpointed(Shared):
    """A backward pass within the backward pass."""

    def forward(self, x):
        return checkpoint(self.head, self.second(2 * self.norm(self.fc(2 * x))), use_reentrant=True)


class Times(nn.Module):
    sltt_time_invariant = True

    def forward(self, weight):
        return 1.1 * weight


class Parametrised(Shared):
    """A weight that is read at every step, and that of a parametrisation, whose backward comes in the middle of the last."""

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.head, "weight", Times())

    def forward(self, x):
        return super().forward(x) * self.head.parametrizations.weight.original.sum()


class Half(Shared):
    def __init__(self):
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x):
        return super().forward(x.bfloat16())


def adding(monkeypatch, adds):
    """On the CPU as on a device, or not at all; returns how many gradients each backward has added at once."""
    monkeypatch.setattr(launching, "DEVICES", {"cpu"} if adds else set())
    numbers, add = [], torch._foreach_add_

    def counted(sums, parts, **options):
        numbers.append(len(sums))
        return add(sums, parts, **options)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    return numbers


def gradients(net, prepare=lambda net: None, iterations=3, **options):
    """Gradients of accumulated iterations."""
    net = sltt_ext.convert(copy.deepcopy(net))
    prepare(net)
    plan = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **{**plan, **options})
    for number in range(iterations):
        generator = torch.Generator().manual_seed(number)
        online.forward_backward(3 * torch.rand(4, 6, generator=generator), TARGET)
    return [parameter.grad for parameter in net.parameters()]


def in_one_memory(net):
    """Gradients that are views of one tensor, as flattening optimizers have them."""
    flat = torch.zeros(sum(parameter.numel() for parameter in net.parameters()))
    start = 0
    for parameter in net.parameters():
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    net.flat = flat


@pytest.mark.parametrize("prepare", [lambda net: None, in_one_memory], ids=["empty", "in one memory"])
@pytest.mark.parametrize("make", [Shared, Embedded, Checkpointed, Parametrised, Half])
@pytest.mark.parametrize("options", [{}, {"k": 2}, {"scale": "paper", "pack_spikes": True}])
def test_gradients_are_autograds_to_the_last_bit(monkeypatch, make, prepare, options):
    if make in (Embedded, Half) and prepare is in_one_memory:
        pytest.skip("such gradients are not dense, or of another dtype")
    results = []
    for adds in (False, True):
        numbers = adding(monkeypatch, adds)
        results.append(gradients(make(), prepare, **options, generator=torch.Generator().manual_seed(0)))
        assert bool(numbers) == adds
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


def test_a_gradient_stays_the_tensor_that_it_is(monkeypatch):
    numbers, kept = adding(monkeypatch, True), []

    def keep(net):
        in_one_memory(net)
        kept.extend(parameter.grad for parameter in net.parameters())

    found = gradients(Shared(), keep)
    assert numbers
    assert all(one is other for one, other in zip(found, kept, strict=True))
    assert all(one.any() for one in kept)


def hook_on_a_parameter(net):
    net.head.bias.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def halve(parameter):
    parameter.grad *= 0.5


def hook_after_accumulation(net):
    net.head.bias.register_post_accumulate_grad_hook(halve)


def hook_where_gradients_add_up(net):
    """As wrappers of several processes have it."""
    node = net.head.bias.view_as(net.head.bias).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: halve(net.head.bias))
    net.kept = [node]


@pytest.mark.parametrize(
    "prepare", [hook_on_a_parameter, hook_after_accumulation, hook_where_gradients_add_up]
)
def test_a_parameter_that_somebody_waits_at_is_left_to_autograd(monkeypatch, prepare):
    results, most = [], []
    for adds in (False, True):
        numbers = adding(monkeypatch, adds)
        results.append(gradients(Shared(), prepare))
        most.append(max(numbers, default=0))
    assert all(map(torch.equal, *results))
    assert most == [0, 5]  # all but the head's bias


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "kind", ["module", "module before", "any module", "backward", "on_step", "forward", "loss"]
)
def test_who_reads_gradients_in_the_middle_finds_what_autograd_has(monkeypatch, kind):
    results = []
    for adds in (False, True):
        adding(monkeypatch, adds)
        net, options, handles = sltt_ext.convert(Shared()), {"loss_fn": F.cross_entropy}, []

        def halve(*_, net=net):
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.5

        def backward(loss, halve=halve):
            loss.backward()
            halve()

        def loss_fn(output, target, halve=halve):
            halve()
            return F.cross_entropy(output, target)

        if kind == "module":
            net.head.register_full_backward_hook(halve)
        elif kind == "module before":
            net.head.register_full_backward_pre_hook(halve)
        elif kind == "any module":
            handles.append(register_module_full_backward_hook(halve))
        elif kind == "forward":
            net.head.register_forward_hook(halve)
        elif kind == "loss":
            options["loss_fn"] = loss_fn
        else:
            options[kind] = {"backward": backward, "on_step": halve}[kind]
        online = sltt_ext.OnlineTrainer(net, time_steps=T, **options)
        try:
            for _ in range(2):
                online.forward_backward(torch.full((4, 6), 0.6), TARGET)
        finally:
            for handle in handles:
                handle.remove()
        results.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *results))


def test_gradients_of_before_are_put_back_after_a_failure(monkeypatch):
    adding(monkeypatch, True)
    net, calls = sltt_ext.convert(Shared()), []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append(None)
            if len(calls) == T + 2:
                raise torch.OutOfMemoryError
            return gradient

    def loss_fn(output, target):
        return F.cross_entropy(Fails.apply(output), target)

    online = sltt_ext.OnlineTrainer(net, loss_fn, T)
    online.forward_backward(torch.rand(4, 6), TARGET)
    before = [(parameter.grad, parameter.grad.clone()) for parameter in net.parameters()]
    with pytest.raises(torch.OutOfMemoryError):
        online.forward_backward(torch.rand(4, 6), TARGET)
    for parameter, (gradient, numbers) in zip(net.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, numbers)


def test_the_gradients_of_a_step_are_bounded(monkeypatch):
    net = Shared()
    sizes = sorted(parameter.nbytes for parameter in net.parameters())
    monkeypatch.setattr(summed_gradients, "MOST_BYTES", sum(sizes[:3]))
    numbers = adding(monkeypatch, True)
    gradients(net)
    assert max(numbers) == 3


def test_a_hook_on_the_loss_that_changes_its_gradient_in_place(monkeypatch):
    def loss_fn(output, target):
        loss = F.cross_entropy(output, target)
        loss.register_hook(lambda gradient: gradient.mul_(2))
        return loss

    results = []
    for adds in (False, True):
        adding(monkeypatch, adds)
        net = sltt_ext.convert(Shared())
        sltt_ext.OnlineTrainer(net, loss_fn, T).forward_backward(torch.full((4, 6), 0.6), TARGET)
        results.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *results))
