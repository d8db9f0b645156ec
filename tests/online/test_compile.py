"""A compiled network in the trainer, and over time: equal results, no graph break, no compilation from step to step."""

import copy

import networks
import oracle
import products
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import sltt_ext
from sltt_ext.spikingjelly.stepwise import FUNCTIONAL_FORM

T = 5
X, TARGET = networks.images()
NEURONS = {
    "LIF": (neuron.LIFNode, {}),
    "LIF, soft reset, ATan": (neuron.LIFNode, {"v_reset": None, "surrogate_function": surrogate.ATan()}),
    "IF": (neuron.IFNode, {}),
    "PLIF": (neuron.ParametricLIFNode, {}),
}
AT_REST_AND_LATER = 2  # the first step starts from the number 0, the others from a tensor
CASES = {
    "steps": ("s", {}, AT_REST_AND_LATER),
    "sequence": ("m", {"chunk": T}, 1),
    "steps, SLTT-2": ("s", {"k": 2}, 2 * AT_REST_AND_LATER),
    "steps, mean": ("s", {"loss_on": "mean"}, 2 * AT_REST_AND_LATER),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "case"), products.spread(NEURONS, CASES, each=2))
def test_compiled_network(name, case):
    cls, kwargs = NEURONS[name]
    step_mode, options, most = CASES[case]
    if step_mode == "m" and not FUNCTIONAL_FORM:
        pytest.skip("multi-step layers of SpikingJelly 0.0.0.0.14 break the graph themselves")
    net = sltt_ext.convert(networks.conv_net(cls, step_mode, **kwargs))
    plain = copy.deepcopy(net)
    plan = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}  # the same in both
    expected = sltt_ext.OnlineTrainer(plain, F.cross_entropy, T, **{**plan, **options})
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)  # a graph break is an error
    online = sltt_ext.OnlineTrainer(compiled, F.cross_entropy, T, **{**plan, **options})
    for iteration in range(4):
        torch.manual_seed(iteration)  # the same steps
        result = online.forward_backward(X, TARGET)
        torch.manual_seed(iteration)
        assert torch.equal(expected.forward_backward(X, TARGET).output, result.output)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6
    assert counters["graph_break"] == {}
    assert graphs() <= most


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", sorted(NEURONS))
def test_compiled_neuron_on_its_own(name, step_mode):
    cls, kwargs = NEURONS[name]
    node = sltt_ext.convert(cls(step_mode=step_mode, **kwargs))
    x_seq = 2 * torch.rand(T, 3, 7)
    expected = oracle.run(copy.deepcopy(node), x_seq, step_mode)
    compiled = torch.compile(node, backend="aot_eager", fullgraph=True)
    steps = [x_seq] if step_mode == "m" else list(x_seq)
    actual = [compiled(x) for x in steps]
    assert torch.equal(torch.stack(actual).reshape(expected.shape), expected)
    assert graphs() <= AT_REST_AND_LATER


def test_nothing_is_compiled_after_the_second_step():
    net = sltt_ext.convert(networks.conv_net())
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    seen = []
    online = sltt_ext.OnlineTrainer(
        compiled, F.cross_entropy, T, backward=lambda loss: (loss.backward(), seen.append(graphs()))
    )
    for _ in range(3):
        online.forward_backward(X, TARGET)
    assert seen == [1] + [2] * (3 * T - 1)
    functional.reset_net(net)


def step_of(how):
    """A network over time of which something is compiled, and what is called."""
    options = {"backend": "aot_eager"}
    net = networks.conv_net()
    if how == "in place, before":
        net.compile(**options)
    if how == "parts, before":
        for module in net:
            module.compile(**options)
    if how == "body, before":
        net = nn.Sequential(torch.compile(net[:5], **options, fullgraph=True), net[5:])
    sltt_ext.over_time(net, T)
    if how == "around":
        return net, torch.compile(nn.Sequential(nn.Identity(), net), **options)
    return net, torch.compile(net, **options) if how == "whole" else net


OVER_TIME = {
    "whole": AT_REST_AND_LATER,
    "in place, before": AT_REST_AND_LATER,
    "around": AT_REST_AND_LATER,
    "body, before": AT_REST_AND_LATER,
    "parts, before": None,
}


@pytest.mark.parametrize("how", OVER_TIME)
def test_a_network_over_time(how):
    """What is compiled is one step, and not the loop; in backward it is the same one."""
    reference = networks.conv_net()
    F.cross_entropy(oracle.StepByStep(reference, T)(X), TARGET).backward()
    net, run = step_of(how)
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(run(X), TARGET).backward()
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6
    if OVER_TIME[how]:
        assert graphs() == OVER_TIME[how]
