import copy

import modules
import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import sltt_ext
from sltt_ext.errors import InputError
from sltt_ext.spikingjelly import SLTTIFNode, SLTTLIFNode, SLTTParametricLIFNode, fused
from sltt_ext.spikingjelly.fused import FusedNode


class RenamedLIF(neuron.LIFNode):
    """A subclass that only sets defaults: the usual way to configure a network."""

    def __init__(self, **kwargs):
        super().__init__(tau=1.3, decay_input=True, v_reset=None, **kwargs)


class LouderLIF(neuron.LIFNode):
    """A subclass that changes the dynamics."""

    def single_step_forward(self, x):
        return super().single_step_forward(1.1 * x)


def currents(time_steps, seed=0):
    return 2 * torch.randn(time_steps, 4, 7, generator=torch.Generator().manual_seed(seed)) + 0.6


def fused_and_original(make):
    original = make()
    converted = sltt_ext.convert(copy.deepcopy(original))
    assert isinstance(converted, FusedNode)
    return original, converted


cases = pytest.mark.parametrize("case", modules.FUSED, ids=lambda case: case.id)
step_modes = pytest.mark.parametrize("step_mode", ["s", "m"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("time_steps", [1, 2, 7])
@step_modes
@cases
def test_spikes_and_state_are_bit_identical(case, step_mode, time_steps, training):
    original, converted = fused_and_original(case.make)
    original.train(training)
    converted.train(training)
    for call in range(2):  # without a reset in between
        x_seq = currents(time_steps, seed=call)
        expected = oracle.run(original, x_seq, "s")
        assert torch.equal(oracle.run(converted, x_seq, step_mode), expected)
        assert torch.equal(converted.v, original.v)


@step_modes
@cases
def test_gradients(case, step_mode):
    original, converted = fused_and_original(case.make)
    x_seq, weight = currents(6), torch.rand(6, 4, 7)
    expected = oracle.module_gradients(original, x_seq, weight, "s", detach=True)
    actual = oracle.module_gradients(converted, x_seq, weight, step_mode)
    for gradient, want in zip(actual, expected):
        assert oracle.relative_error(gradient, want) < 1e-6


@step_modes
@cases
def test_gradients_in_evaluation_mode_are_the_originals(case, step_mode):
    """0.0.0.0.14's IF and LIF, and 2.x's SLTTLIFNode, have no surrogate there."""
    original, converted = (node.eval() for node in fused_and_original(case.make))
    has_surrogate = case.name == "ParametricLIFNode" or (FUNCTIONAL_FORM and case.name != "SLTTLIFNode")
    assert original(currents(1)[0].requires_grad_()).requires_grad == has_surrogate
    x_seq = currents(2).requires_grad_()
    assert oracle.run(converted, x_seq, step_mode).requires_grad == has_surrogate


def test_the_fused_operator_is_what_runs(monkeypatch):
    """The two tests above would pass on the generic path, too."""
    calls, run = [], fused.run_lif
    monkeypatch.setattr(fused, "run_lif", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    for case in modules.FUSED:
        _, converted = fused_and_original(case.make)
        calls.clear()
        converted(currents(1)[0])
        assert len(calls) == 1, case.id


SURROGATES = [
    getattr(surrogate, name)()
    for name in (
        "Sigmoid",
        "ATan",
        "PiecewiseQuadratic",
        "PiecewiseExp",
        "SoftSign",
        "Erf",
        "LeakyKReLU",
        "Rect",
        "S2NN",
    )
    if hasattr(surrogate, name)
]


@pytest.mark.parametrize("function", SURROGATES, ids=lambda function: type(function).__name__)
@step_modes
def test_every_surrogate(function, step_mode):
    original, converted = fused_and_original(lambda: neuron.LIFNode(surrogate_function=function))
    x_seq, weight = currents(5), torch.rand(5, 4, 7)
    expected = oracle.module_gradients(original, x_seq, weight, "s", detach=True)
    actual = oracle.module_gradients(converted, x_seq, weight, step_mode)
    assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("detach_reset", [True, False])
@cases
def test_loss_on_the_membrane_potential(case, detach_reset):
    original = case.make()
    original.detach_reset = detach_reset
    x_seq, weight = currents(5), torch.randn(4, 7)
    results = []
    for node in fused_and_original(lambda: original):
        inputs = x_seq.clone().requires_grad_()
        for x in inputs:
            (node(x).sum() + (node.v * weight).sum()).backward()
            functional.detach_net(node)
        results.append([inputs.grad, *oracle.gradients(node)])
    assert oracle.relative_error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("reset", [0.0, None, 0.25])
def test_potential_exactly_at_the_threshold(reset):
    x_seq, weight = (4 * currents(5)).round() / 4, torch.rand(4, 7)
    assert (x_seq[0] == 1.0).any()
    results = []
    for node in fused_and_original(lambda: neuron.IFNode(v_reset=reset)):
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
    bptt = oracle.module_gradients(copy.deepcopy(original), x_seq, weight, "m")
    sltt = oracle.module_gradients(original, x_seq, weight, "s", detach=True)
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
    assert not isinstance(sltt_ext.convert(LouderLIF()), FusedNode)


def test_tensor_threshold_takes_the_generic_path():
    original = neuron.LIFNode()
    original.v_threshold = torch.tensor(0.7) if FUNCTIONAL_FORM else 0.7
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq, weight = currents(5), torch.rand(5, 4, 7)
    expected = oracle.module_gradients(original, x_seq, weight, "s", detach=True)
    actual = oracle.module_gradients(converted, x_seq, weight, "s")
    assert oracle.relative_error(actual, expected) < 1e-6


@step_modes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("node", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_store_v_seq(node, training, step_mode):
    original = node(step_mode=step_mode, store_v_seq=True)
    converted = sltt_ext.convert(copy.deepcopy(original))
    original.train(training)
    converted.train(training)
    x_seq, weight = currents(5), torch.randn(5, 4, 7)
    for _ in range(2):
        for each in (original, converted):
            oracle.run(each, x_seq, step_mode)
        if original.v_seq is not None:  # 0.0.0.0.14 records whole sequences only
            assert torch.equal(converted.v_seq, original.v_seq)
    if step_mode == "m" and training:
        inputs = [x_seq.clone().requires_grad_() for _ in range(2)]
        converted.reset()
        original.reset()
        converted(inputs[0])
        (converted.v_seq * weight).sum().backward()
        for x, step_weight in zip(inputs[1], weight):
            original.step_mode = "s"
            original(x)
            (original.v * step_weight).sum().backward()
            functional.detach_net(original)
        assert oracle.relative_error(inputs[0].grad, inputs[1].grad) < 1e-6


def test_new_batch_size():
    original, converted = fused_and_original(lambda: neuron.LIFNode(v_reset=-0.2))
    x = currents(1)[0]
    converted(x)
    original(x)
    if FUNCTIONAL_FORM:  # starts from rest, as the original does
        assert torch.equal(converted(x[:3]), original(x[:3]))
        assert torch.equal(converted.v, original.v)
        return
    with pytest.raises(RuntimeError, match="size of tensor"):
        original(x[:3])
    with pytest.raises(InputError, match="reset the network"):
        converted(x[:3])


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
@pytest.mark.parametrize("cls", [neuron.LIFNode, neuron.QIFNode])
@step_modes
def test_functional_forward(cls, step_mode):
    from spikingjelly.activation_based import base

    node = sltt_ext.convert(cls(step_mode=step_mode))
    *x_seq, v = currents(4)
    x_seq = torch.stack(x_seq).requires_grad_()
    v.requires_grad_()
    inputs = x_seq if step_mode == "m" else x_seq[0]
    (spikes,), (v_next,) = base.to_functional_forward(node)((inputs,), (v,))
    spikes.sum().backward()
    gradients = [x_seq.grad.clone(), v.grad.clone()]
    x_seq.grad = v.grad = None
    expected = cls()
    expected.v = v
    each_step = []
    for x in x_seq if step_mode == "m" else x_seq[:1]:
        each_step.append(expected(x))
        each_step[-1].sum().backward()
        expected.detach()
    assert torch.equal(spikes.flatten(), torch.stack(each_step).flatten())
    assert torch.equal(v_next, expected.v)
    assert oracle.relative_error(gradients, [x_seq.grad, v.grad]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    node = sltt_ext.convert(nn.Sequential(neuron.LIFNode())).to(dtype)
    x = currents(1)[0].to(dtype)
    assert node(x).dtype == dtype
    assert node[0].v.dtype == torch.float32
