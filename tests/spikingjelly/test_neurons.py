import copy
import itertools
import pickle

import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import sltt_ext
from sltt_ext.spikingjelly import SLTTIFNode, SLTTLIFNode, SLTTParametricLIFNode
from sltt_ext.spikingjelly.neurons import FusedNode, StepwiseNode

RESETS = [0.0, None, -0.3]
FUSED = [
    *[(neuron.IFNode, {"v_reset": reset}) for reset in RESETS],
    *[
        (neuron.LIFNode, {"tau": tau, "decay_input": decay_input, "v_reset": reset})
        for tau, decay_input, reset in itertools.product([1.1, 2.0, 3.7], [True, False], RESETS)
    ],
    *[
        (neuron.ParametricLIFNode, {"init_tau": 1.7, "decay_input": decay_input, "v_reset": reset})
        for decay_input, reset in itertools.product([True, False], RESETS)
    ],
]


class LeakyBySubclass(neuron.BaseNode):
    """A user's own neuron, written against SpikingJelly 2.x's functional interface."""

    def single_step_functional_forward(self, inputs, states, **kwargs):
        h = 0.7 * states[0] + inputs[0].tanh()
        spike = self.surrogate_function(h - self.v_threshold)
        return (spike,), (self.apply_soft_reset(h, spike, self.v_threshold), *states[1:])


class AdaptiveByMemories(neuron.SimpleBaseNode):
    """A user's own neuron with two states, written step by step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_memory("w", 0.0)

    def neuronal_charge(self, x):
        self.v = 0.8 * self.v + x - 0.2 * self.w
        self.w = 0.9 * self.w + self.v


class RenamedLIF(neuron.LIFNode):
    """A subclass that only sets defaults: the usual way to configure a network."""

    def __init__(self, **kwargs):
        super().__init__(tau=1.3, decay_input=False, v_reset=None, **kwargs)


class NoisyLIF(neuron.LIFNode):
    """A subclass that changes the dynamics."""

    def single_step_functional_forward(self, inputs, states, **kwargs):
        return super().single_step_functional_forward((1.1 * inputs[0],), states, **kwargs)


GENERIC = [
    (neuron.QIFNode, {}),
    (neuron.EIFNode, {}),
    (neuron.IzhikevichNode, {}),
    (neuron.KLIFNode, {}),
    (neuron.CUBALIFNode, {}),
    (neuron.TernaryLIFNode, {}),
    (neuron.TernaryIFNode, {}),
    (neuron.ComplementaryLIFNode, {}),
    (neuron.ILIFNode, {}),
    (neuron.HalfThresholdIFNode, {}),
    (neuron.ActivationAwareIFNode, {}),
    (neuron.SLTTLIFNode, {}),
    (neuron.SimpleLIFNode, {"tau": 2.0, "decay_input": True}),
    (neuron.LIFNode, {"surrogate_function": surrogate.S2NN()}),
    (neuron.LIFNode, {"store_v_seq": True}),
    (LeakyBySubclass, {}),
    (AdaptiveByMemories, {}),
    (NoisyLIF, {}),
]


def ids(cases):
    return [f"{cls.__name__}-{'-'.join(map(repr, kwargs.values()))}" for cls, kwargs in cases]


def currents(time_steps, seed=0):
    return 2 * torch.randn(time_steps, 4, 7, generator=torch.Generator().manual_seed(seed)) + 0.6


def run(node, x_seq, step_mode):
    node.step_mode = step_mode
    if step_mode == "m":
        return node(x_seq)
    return torch.stack([node(x) for x in x_seq])


@pytest.mark.parametrize("time_steps", [1, 2, 7])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(("cls", "kwargs"), FUSED + GENERIC, ids=ids(FUSED + GENERIC))
def test_spikes_and_state_are_bit_identical(cls, kwargs, step_mode, time_steps):
    original = cls(**kwargs)
    converted = sltt_ext.convert(copy.deepcopy(original))
    for call in range(2):  # without a reset in between
        x_seq = currents(time_steps, seed=call)
        expected = run(original, x_seq, "s")
        assert torch.equal(run(converted, x_seq, step_mode), expected)
        for name, value in original.named_memories():
            assert torch.equal(dict(converted.named_memories())[name], value)


def neuron_gradients(node, x_seq, weight, step_mode, detach):
    x_seq = x_seq.clone().requires_grad_()
    node.zero_grad()
    node.reset()
    node.step_mode = step_mode
    if step_mode == "m":
        (node(x_seq) * weight).sum().backward()
    else:
        for x, step_weight in zip(x_seq, weight):
            (node(x) * step_weight).sum().backward()
            if detach:
                functional.detach_net(node)
    return [x_seq.grad, *oracle.gradients(node)]


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(("cls", "kwargs"), FUSED, ids=ids(FUSED))
def test_fused_gradients(cls, kwargs, step_mode):
    original = cls(**kwargs)
    converted = sltt_ext.convert(copy.deepcopy(original))
    assert isinstance(converted, FusedNode)
    x_seq, weight = currents(6), torch.rand(6, 4, 7)
    expected = neuron_gradients(original, x_seq, weight, "s", detach=True)
    for actual, want in zip(neuron_gradients(converted, x_seq, weight, step_mode, detach=False), expected):
        assert oracle.relative_error(actual, want) < 1e-6


@pytest.mark.parametrize(("cls", "kwargs"), GENERIC, ids=ids(GENERIC))
def test_generic_gradients_are_bit_identical(cls, kwargs):
    original = cls(**kwargs)
    converted = sltt_ext.convert(copy.deepcopy(original))
    assert isinstance(converted, StepwiseNode)
    x_seq, weight = currents(6), torch.rand(6, 4, 7)
    expected = neuron_gradients(original, x_seq, weight, "s", detach=True)
    actual = neuron_gradients(converted, x_seq, weight, "s", detach=False)
    assert all(torch.equal(*pair) for pair in zip(actual, expected))
    multi_step = neuron_gradients(converted, x_seq, weight, "m", detach=False)
    assert torch.equal(multi_step[0], expected[0])
    assert oracle.relative_error(multi_step, expected) < 1e-6  # parameters: summed over T in another order


SURROGATES = [
    surrogate.Sigmoid(),
    surrogate.ATan(),
    surrogate.PiecewiseQuadratic(),
    surrogate.PiecewiseExp(),
    surrogate.SoftSign(),
    surrogate.Erf(),
    surrogate.LeakyKReLU(),
    surrogate.Rect(),
    surrogate.S2NN(),
]


@pytest.mark.parametrize("function", SURROGATES, ids=repr)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_every_surrogate(function, step_mode):
    original = neuron.LIFNode(surrogate_function=function)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq, weight = currents(5), torch.rand(5, 4, 7)
    expected = neuron_gradients(original, x_seq, weight, "s", detach=True)
    actual = neuron_gradients(converted, x_seq, weight, step_mode, detach=False)
    assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("cls", "kwargs"), FUSED, ids=ids(FUSED))
def test_loss_on_the_membrane_potential(cls, kwargs, detach_reset):
    original = cls(detach_reset=detach_reset, **kwargs)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq, weight = currents(5), torch.randn(4, 7)
    results = []
    for node in (original, converted):
        inputs = x_seq.clone().requires_grad_()
        for x in inputs:
            (node(x).sum() + (node.v * weight).sum()).backward()
            functional.detach_net(node)
        results.append([inputs.grad, *oracle.gradients(node)])
    assert oracle.relative_error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("reset", [0.0, None, 0.25])
def test_potential_exactly_at_the_threshold(reset):
    original = neuron.IFNode(v_reset=reset)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq, weight = (4 * currents(5)).round() / 4, torch.rand(4, 7)
    assert (x_seq[0] == 1.0).any()
    results = []
    for node in (original, converted):
        inputs, spikes = x_seq.clone().requires_grad_(), []
        for x in inputs:
            spikes.append(node(x))
            (spikes[-1].sum() + (node.v * weight).sum()).backward()
            functional.detach_net(node)
        results.append((torch.stack(spikes), inputs.grad))
    assert torch.equal(results[1][0], results[0][0])
    assert oracle.relative_error(results[1][1], results[0][1]) < 1e-6


def test_bptt_gradient_is_different():
    """The oracle is not BPTT in disguise: the original's own gradient has temporal terms."""
    original = neuron.LIFNode()
    x_seq, weight = currents(6), torch.rand(6, 4, 7)
    bptt = neuron_gradients(copy.deepcopy(original), x_seq, weight, "m", detach=False)
    sltt = neuron_gradients(original, x_seq, weight, "s", detach=True)
    assert oracle.relative_error(bptt, sltt) > 0.01


@pytest.mark.parametrize(
    ("original", "adapter"),
    [
        (neuron.IFNode, SLTTIFNode),
        (neuron.LIFNode, SLTTLIFNode),
        (neuron.ParametricLIFNode, SLTTParametricLIFNode),
    ],
)
def test_explicit_classes(original, adapter):
    node = sltt_ext.convert(original())
    assert type(node) is adapter
    assert isinstance(node, original)
    assert type(sltt_ext.revert(adapter())) is original


def test_subclass_with_other_defaults_is_fused_and_one_with_other_dynamics_is_not():
    assert isinstance(sltt_ext.convert(RenamedLIF()), FusedNode)
    assert not isinstance(sltt_ext.convert(NoisyLIF()), FusedNode)


@pytest.mark.parametrize(("cls", "kwargs"), [(RenamedLIF, {}), (neuron.QIFNode, {}), (neuron.LIFNode, {})])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
def test_copies_and_pickles(cls, kwargs, duplicate):
    node = sltt_ext.convert(cls(**kwargs))
    x = currents(1)[0]
    node(x)
    twin = duplicate(node)
    assert type(twin) is type(node)
    assert torch.equal(twin(x), node(x))
    assert type(sltt_ext.revert(twin)) is cls


def test_tensor_threshold_takes_the_generic_path():
    original = neuron.LIFNode()
    original.v_threshold = torch.tensor(0.7)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq, weight = currents(5), torch.rand(5, 4, 7)
    expected = neuron_gradients(original, x_seq, weight, "s", detach=True)
    assert torch.equal(neuron_gradients(converted, x_seq, weight, "s", detach=False)[0], expected[0])


def test_store_v_seq():
    original, x_seq = neuron.LIFNode(step_mode="m", store_v_seq=True), currents(5)
    converted = sltt_ext.convert(copy.deepcopy(original))
    for _ in range(2):
        original(x_seq)
        converted(x_seq)
        assert torch.equal(converted.v_seq, original.v_seq)


def test_new_batch_size_starts_from_rest_as_the_original_does():
    original = neuron.LIFNode(v_reset=-0.2)
    converted = sltt_ext.convert(copy.deepcopy(original))
    for batch in (4, 3):
        x = currents(1)[0][:batch]
        assert torch.equal(converted(x), original(x))
        assert torch.equal(converted.v, original.v)


def test_functional_forward():
    from spikingjelly.activation_based import base

    for cls in (neuron.LIFNode, neuron.QIFNode):
        node = sltt_ext.convert(cls())
        x, v = currents(2)
        v.requires_grad_()
        (spike,), (v_next,) = base.to_functional_forward(node)((x,), (v,))
        expected = cls()
        expected.v = v.detach()
        assert torch.equal(spike, expected(x))
        assert torch.equal(v_next, expected.v)
        assert not v_next.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    node = sltt_ext.convert(nn.Sequential(neuron.LIFNode())).to(dtype)
    x = currents(1)[0].to(dtype)
    assert node(x).dtype == dtype
    assert node[0].v.dtype == torch.float32
