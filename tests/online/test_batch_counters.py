"""Norms' counters brought up to date once a pass: what is there at the end, and whoever reads them before."""

import copy

import modules
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.online import launching

T = 4
TARGET = torch.tensor([0, 1, 2, 0])


def network(momentum=0.1):
    torch.manual_seed(0)
    norms = [layer.BatchNorm1d(6, momentum=momentum) for _ in range(3)]
    return nn.Sequential(
        layer.Linear(6, 6),
        norms[0],
        neuron.LIFNode(),
        norms[1],
        norms[2],
        neuron.LIFNode(),
        layer.Linear(6, 3),
    )


def run(monkeypatch, once, net, **options):
    """Counters and running means after training, and after a pass without gradients."""
    monkeypatch.setattr(launching, "DEVICES", {"cpu"} if once else set())
    net = sltt_ext.convert(copy.deepcopy(net))
    online = sltt_ext.OnlineTrainer(net, options.pop("loss_fn", F.cross_entropy), T, **options)
    for _ in range(3):
        online.forward_backward(torch.linspace(0, 3, 24).view(4, 6), TARGET)
    online.predict(torch.rand(4, 6))
    return {name: buffer.clone() for name, buffer in net.named_buffers() if type(buffer) is torch.Tensor}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("step_mode", "options"), [("s", {}), ("m", {}), ("m", {"chunk": 2}), ("m", {"k": 2})]
)
def test_counters_are_those_of_every_step(monkeypatch, step_mode, options, momentum):
    if step_mode == "m" and not modules.FUNCTIONAL_FORM:
        pytest.skip("norms of SpikingJelly 0.0.0.0.14 take no sequences [T, N, C]")
    net = network(momentum)
    functional.set_step_mode(net, step_mode)
    torch.manual_seed(0)
    every_step = run(monkeypatch, False, net, **options)
    torch.manual_seed(0)
    once = run(monkeypatch, True, net, **options)
    assert every_step.keys() == once.keys()
    assert all(torch.equal(every_step[name], once[name]) for name in every_step)


READERS = {
    "the number": lambda norm: int(norm.num_batches_tracked),
    "a sum": lambda norm: (norm.num_batches_tracked + 1).item(),
    "a function": lambda norm: torch.stack([norm.num_batches_tracked] * 2).tolist(),
    "a state dict": lambda norm: norm.state_dict()["num_batches_tracked"].item(),
    "a copy": lambda norm: copy.deepcopy(norm.num_batches_tracked).item(),
    "compared": lambda norm: bool(norm.num_batches_tracked > 5),
    "printed": lambda norm: f"{norm.num_batches_tracked}",
    "set back": lambda norm: norm.num_batches_tracked.zero_().item(),
    "counted by hand": lambda norm: norm.num_batches_tracked.add_(torch.tensor(2)).item(),
    "exchanged": lambda norm: setattr(norm, "num_batches_tracked", norm.num_batches_tracked + 3),
    "moved": lambda norm: norm.double().float().num_batches_tracked.item(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_who_reads_a_counter_in_the_middle_finds_what_it_is(monkeypatch, read):
    results = []
    for once in (False, True):
        net, seen = network(), []
        net[3].register_forward_hook(lambda norm, *_, seen=seen: seen.append(read(norm)))
        results.append((seen, run(monkeypatch, once, net)))
    (seen, buffers), (seen_once, buffers_once) = results
    assert seen == seen_once
    assert all(torch.equal(buffers[name], buffers_once[name]) for name in buffers)


def test_one_operator_counts_for_all_norms(monkeypatch):
    calls, add = [], torch._foreach_add_

    def counted(tensors, *args, **options):
        if tensors[0].dtype == torch.int64:
            calls.append(len(tensors))
        return add(tensors, *args, **options)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    run(monkeypatch, True, network())
    assert calls == [3] * 4
    run(monkeypatch, False, network())
    assert calls == [3] * 4


def test_counters_are_right_after_a_failure(monkeypatch):
    calls = []

    def loss_fn(output, target):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return F.cross_entropy(output, target)

    monkeypatch.setattr(launching, "DEVICES", {"cpu"})
    net = sltt_ext.convert(network())
    before = net[3].num_batches_tracked
    with pytest.raises(torch.OutOfMemoryError):
        sltt_ext.OnlineTrainer(net, loss_fn, T).forward_backward(torch.rand(4, 6), TARGET)
    assert net[3].num_batches_tracked is before
    assert before == 3
