"""Neurons that carry the charged potential instead of ``v``, and what the rest of the world sees of it."""

import copy
import pickle

import modules
import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, neuron

import sltt_ext
from sltt_ext.analysis import ActivationMeter
from sltt_ext.spikingjelly import fused

cases = pytest.mark.parametrize("case", modules.FUSED, ids=lambda case: case.id)
step_modes = pytest.mark.parametrize("step_mode", ["s", "m"])


def currents(time_steps, seed=0):
    return 2 * torch.randn(time_steps, 4, 7, generator=torch.Generator().manual_seed(seed)) + 0.6


def two(case):
    """The same neuron, carrying ``v`` and carrying the charged potential."""
    plain = sltt_ext.convert(case.make())
    charged = copy.deepcopy(plain)
    charged.carry_charged(True)
    return plain, charged


def calls(node, x_seq):
    """What a network would be called with, one after the other: single steps, or two chunks."""
    return x_seq.split([2, len(x_seq) - 2]) if node.step_mode == "m" else x_seq


def train(node, x_seq, weight, step_mode, read=lambda node: None):
    """Spikes, final state and gradients of a training iteration that reads ``read(node)`` at every step."""
    node.step_mode, inputs, spikes = step_mode, x_seq.clone().requires_grad_(), []
    for x, w in zip(calls(node, inputs), calls(node, weight)):
        s = node(x)
        potential = read(node)
        ((s * w).sum() + (0 if potential is None else (potential * weight[0]).sum())).backward()
        spikes.append(s.detach().flatten())
        node.detach_state()
    node.carry_charged(False)
    return [torch.cat(spikes), node.v, inputs.grad, *oracle.gradients(node)]


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def read_in_a_monitor(node):
    with torch.no_grad():
        node.v.clone()
    return node.v


@pytest.mark.parametrize("read", [lambda node: None, lambda node: node.v, read_in_a_monitor])
@pytest.mark.parametrize("detach_reset", [False, True])
@step_modes
@cases
def test_spikes_state_and_gradients_are_the_same(case, step_mode, detach_reset, read):
    results = []
    for node in two(case):
        node.detach_reset = detach_reset
        results.append(
            train(
                node,
                currents(6),
                torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(1)),
                step_mode,
                read,
            )
        )
    assert_equal(*results)


@cases
def test_one_tensor_stays_behind_a_step(case):
    node = sltt_ext.convert(case.make())
    node.carry_charged(True)
    x = torch.randn(50, 100, requires_grad=True)
    with ActivationMeter() as meter:
        for _ in range(3):
            spikes = node(x)
            in_graph = meter.live_bytes - spikes.nbytes
            spikes.sum().backward()
            meter.exclude(x.grad)
            del spikes
            node.detach_state()
            assert meter.live_bytes // x.nbytes == 1
            if case.name != "ParametricLIFNode":  # which saves the derivative of its decay as well
                assert in_graph <= x.nbytes + 64


@cases
def test_the_state_stays_where_it_is(case):
    node = sltt_ext.convert(case.make())
    node.carry_charged(True)
    places = set()
    for x in currents(4):
        node(x.requires_grad_()).sum().backward()
        node.detach_state()
        places.add(node._memories["v"].h.data_ptr())
    assert len(places) == 1


@cases
def test_a_neuron_that_is_called_twice_a_step(case):
    results = []
    for node in two(case):
        torch.manual_seed(2)
        net = torch.nn.Sequential(node, torch.nn.Linear(7, 7), node)
        for x in currents(4):
            net(x.requires_grad_()).square().sum().backward()
            node.detach_state()
        node.carry_charged(False)
        results.append([node.v, *oracle.gradients(net)])
    assert oracle.relative_error(*results) < 1e-6


@cases
def test_a_graph_that_outlives_its_step_gives_no_wrong_numbers(case):
    node = sltt_ext.convert(case.make())
    node.carry_charged(True)
    x = currents(3).requires_grad_()
    node(x[0])
    node.detach_state()
    spikes = node(x[1])
    node.detach_state()
    node(x[2])
    with pytest.raises(RuntimeError, match="inplace operation"):
        spikes.sum().backward()


class Step(torch.nn.Module):
    """No surrogate that the fused operator knows."""

    def forward(self, u):
        return (u >= 0).to(u)


def changes():
    yield "assigned", lambda node: setattr(node, "v", torch.full((4, 7), 0.3))
    yield "changed in place", lambda node: node.v.mul_(0.5)
    yield "detached by the framework", functional.detach_net
    yield "moved", lambda node: node.double().float()
    yield "another threshold", lambda node: setattr(node, "v_threshold", 0.4)
    yield "reset", lambda node: node.reset()
    yield "reset for the loop", lambda node: node.reset_state()
    yield "evaluated", lambda node: node.eval()
    yield "generic rule", lambda node: setattr(node, "surrogate_function", Step())
    yield "potentials stored", lambda node: setattr(node, "store_v_seq", True)
    yield "reverted and converted", lambda node: sltt_ext.convert(sltt_ext.revert(node))
    yield "read as memories", lambda node: [value.clone() for _, value in node.named_memories()]
    yield "stopped", lambda node: node.carry_charged(False)


@pytest.mark.parametrize("change", [change for _, change in changes()], ids=[name for name, _ in changes()])
@cases
def test_between_two_steps(case, change):
    results = []
    x_seq = currents(4)
    for node in two(case):
        spikes = [node(x) for x in x_seq[:2]]
        node.detach_state()
        change(node)
        spikes += [node(x) for x in x_seq[2:]]
        results.append((*spikes, node.v))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="0.0.0.0.14 refuses it")
def test_another_batch_starts_from_rest():
    node = sltt_ext.convert(neuron.LIFNode())
    node.carry_charged(True)
    x = currents(1)[0]
    node(x)
    assert torch.equal(node(x[:3]), sltt_ext.convert(neuron.LIFNode())(x[:3]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
def test_copies_go_on_where_the_original_does(copied):
    node = sltt_ext.convert(neuron.LIFNode())
    node.carry_charged(True)
    x_seq = currents(3)
    node(x_seq[0])
    node.detach_state()
    other = copied(node)
    assert torch.equal(other(x_seq[1]), node(x_seq[1]))
    assert torch.equal(other.v, node.v)


def test_nothing_of_it_is_left_after_revert():
    node = neuron.LIFNode()
    before = set(vars(node))
    sltt_ext.convert(node).carry_charged(True)
    node(currents(1)[0])
    sltt_ext.revert(node)
    assert set(vars(node)) == before
    assert isinstance(node.v, torch.Tensor)


def trained(step_mode="s"):
    net = sltt_ext.convert(torch.nn.Sequential(torch.nn.Linear(3, 4), neuron.LIFNode(step_mode=step_mode)))
    online = sltt_ext.OnlineTrainer(net, lambda output, target: output.sum(), 3, chunk=1, pack_spikes=False)
    online.forward_backward(2 * torch.rand(2, 3), None)
    return net


READERS = {
    "attribute": lambda net: net[1].v,
    "memories": lambda net: next(net[1].memories()),
    "named": lambda net: dict(net[1].named_memories())["v"],
    "of the interface": lambda net: net[1].carried()["v"],
    "reverted": lambda net: sltt_ext.revert(net)[1]._memories["v"],
    "copied": lambda net: copy.deepcopy(net)[1]._memories["v"],
    "pickled": lambda net: pickle.loads(pickle.dumps(net))[1]._memories["v"],
    "moved": lambda net: net.double()[1]._memories["v"].float(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_the_reset_that_is_due_after_training_waits_for_a_reader(read, monkeypatch):
    torch.manual_seed(0)
    net = trained()
    assert isinstance(net[1]._memories["v"], fused._Charged)
    state = read(net)
    monkeypatch.setattr(fused.FusedNode, "_settle", lambda node: None)
    torch.manual_seed(0)
    expected = trained()[1]._memories["v"].settled()
    assert isinstance(state, torch.Tensor)
    assert torch.equal(state, expected)


def test_a_state_that_nobody_has_read_is_not_settled(monkeypatch):
    monkeypatch.setattr(fused._Charged, "settled", lambda held: pytest.fail("a state was settled"))
    net = trained()
    functional.reset_net(net)
    assert net[1].v == 0


def test_a_failure_is_not_hidden_by_the_reset_that_is_due(monkeypatch):
    """Which needs memory, and that may be what has run out."""

    def failing(*args):
        monkeypatch.setattr(fused._Charged, "settled", lambda held: pytest.fail("a state was settled"))
        raise torch.cuda.OutOfMemoryError

    net = sltt_ext.convert(torch.nn.Sequential(torch.nn.Linear(3, 4), neuron.LIFNode()))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sltt_ext.OnlineTrainer(net, failing, 2).forward_backward(torch.rand(2, 3), None)
    assert net[1].v == 0
